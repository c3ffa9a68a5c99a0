"""Strings that would run something if anybody took them for more than text."""

from __future__ import annotations

import random
from pathlib import Path

PAYLOADS = (
    ";{touch}",
    ";{touch};",
    "$({touch})",
    "`{touch}`",
    "|{touch}",
    "|{touch}#",
    "||{touch}",
    "&{touch}&",
    "&&{touch}",
    "\n{touch}\n",
    "\r\n{touch}\r\n",
    "';{touch};'",
    '";{touch};"',
    "'\"$({touch})\"'",
    "\\';{touch};\\'",
    "';{touch};#",
    ";touch${{IFS}}{canary}",
    "{{touch,{canary}}}",
    "$(({touch}))",
    "${{x:=$({touch})}}",
    "<({touch})",
    ">{canary}",
    ">>{canary}",
    "2>{canary}",
    "-oProxyCommand={touch}",
    "-oLocalCommand={touch} -oPermitLocalCommand=yes",
    "--{touch}",
    "-F{canary}",
    "-E{canary}",
    "%n%h%p%r$({touch})",
    "*?[a-z]~{touch}",
    "~;{touch}",
    "!{touch}",
    "\\\n{touch}",
    "\n#SBATCH --wrap='{touch}'",
    " --wrap={touch}",
    ",HACK=$({touch})",
    "() {{ :; }}; {touch}",
    "{touch} \u202e\u2028\u200b\ufeffé\U0001f40d",
    "\x1b]0;{touch}\x07\x1b[2J",
    "\x9b31m\x85{touch}",
    "!!python/object/apply:os.system ['{touch}']",
    "{{{{{touch}}}}}",
    "__import__('os').system('{touch}')",
    "\0;{touch}",
    "\udcff\udcfe;{touch}",
)


class Injections:
    """Makes them; `canaries` says what was run.

    Args:
        folder: where a canary is made by its whole path. Those with a bare name land where they are run.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.made = 0

    def __call__(self, without: str = "", around: str = "") -> str:
        """A string with a payload.

        Args:
            without: characters that cannot be where it goes, such as "/" in a file's name.
            around: alphabet of the harmless text before and behind it.
        """
        self.made += 1
        bare = "/" in without or self.rng.random() < 0.5
        canary = f"CANARY{self.made}" if bare else f"{self.folder}/CANARY{self.made}"
        payload = self.rng.choice(PAYLOADS).format(touch=f"touch {canary}", canary=canary)
        if self.rng.random() < 0.2:
            payload += self.rng.choice(PAYLOADS).format(touch=f"touch {canary}", canary=canary)
        for character in without:
            payload = payload.replace(character, "")
        if self.rng.random() < 0.2:
            payload = payload.replace(" ", "${IFS}" if self.rng.random() < 0.5 else "\t")
        before, behind = ("".join(self.rng.choices(around or "", k=self.rng.randint(0, 3))) if around else "",) * 2
        return before + payload + behind

    def canaries(self, *roots: Path) -> list[Path]:
        """In the folder, where we stand, in the home directory, and below `roots`."""
        found = [p for place in (self.folder, Path.cwd(), Path.home()) for p in place.glob("*CANARY*")]
        for root in roots:
            # A directory's own name may well be a payload; a canary is a file that nobody here made.
            found += [p for p in root.rglob("*CANARY*") if p.is_file() and p.name.startswith("CANARY")]
        return found
