#!/usr/bin/env bash
# The quick tests on what plain `pip install .` resolves to: streaming's pins hold it at transformers 4.57 and bring
# torchvision along. Usage: tests/pip_set.sh [DIRECTORY FOR THE ENVIRONMENT]
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:-.venv-pip}
test -x "$environment/bin/python" || "${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check '.[beam,demo,tensorboard,test]'
"$environment/bin/python" - <<'PY'
from importlib.metadata import version

for name in ("torch", "torchvision", "torchaudio", "transformers", "mosaicml-streaming", "deepspeed"):
    print(f"{name} {version(name)}")
assert version("transformers").startswith("4.57."), "streaming's pins have moved: look at pyproject.toml"
PY
# From the source tree, so that the installed copy is what is imported.
exec "$environment/bin/python" -P -m pytest -m "not ranks" -p no:cacheprovider tests
