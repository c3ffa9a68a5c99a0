"""The training loop of one rank, from the sealed checkpoint it resumes from to the last step."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor

from launcher import recipe_file, rundir
from launcher.committer import Outcome as Saved
from launcher.errors import ExitCode, StorageError, TrainingError
from launcher.marks import mark
from launcher.recipe import Recipe
from launcher.rundir import Attempt
from launcher.worker import learning, vocabularies
from launcher.worker.backbone import SpeechModel
from launcher.worker.cadence import Moment, is_due, why_early
from launcher.worker.checkpoint import Checkpoints, Identity, Progress
from launcher.worker.data import BackgroundCheck, Tensors, ahead, pad_to
from launcher.worker.engine import AccelerateEngine, Engine, check_precision
from launcher.worker.evaluate import Evaluator
from launcher.worker.evaluating import Evaluations
from launcher.worker.librispeech import SAMPLE_RATE_HZ
from launcher.worker.models import build
from launcher.worker.nonfinite import blame
from launcher.worker.out_of_memory import batch_in_words, memory_errors
from launcher.worker.pace import Pace
from launcher.worker.ranks import Ranks, patience_s
from launcher.worker.record import Record
from launcher.worker.sampler import MicroBatch, Step, accumulation, digest, utterances_in
from launcher.worker.schedule import learning_rate
from launcher.worker.sidecar import Outcome
from launcher.worker.training_set import TrainingSet

LOOK_S = 0.05
"""Between two looks at the control directory, at least. To list it takes 0.08 ms: a hundredth of the shortest steps."""

UNPUBLISHED = 3
"""So many evaluations in a row that cannot be published end the run, as so many saves do."""


def engine_for(
    model: SpeechModel, recipe: Recipe, accumulation: int, deepspeed_config: dict[str, Any], ranks: Ranks
) -> Engine:
    """The engine that the recipe asks for; a rank that got another raises before the first step."""
    if recipe.zero_stage == "off":
        return AccelerateEngine(model, recipe, accumulation, ranks)
    from launcher.worker.engine_deepspeed import DeepSpeedEngine  # 3 s of imports that `off` does without

    return DeepSpeedEngine(model, recipe, deepspeed_config, ranks)


@dataclass(frozen=True)
class Saving:
    """A save that was begun and is not settled yet."""

    step: int
    began: float
    best_before: tuple[float, int]
    """Best WER and its step, should this save of a new best come to nothing."""


class Training:
    """One rank's training, from launch to exit."""

    def __init__(self, attempt: Attempt, stop_flag: list[bool], fresh: bool) -> None:
        self.attempt = attempt
        self.run = attempt.run
        self.stop_flag = stop_flag
        self.asked: str | None = None
        """Rank 0: who asked for a stop through the control directory."""
        self.recipe = recipe_file.load(self.run.resolved)
        self.ranks = ranks = Ranks(patience_s(self.recipe.launch.deadlines))
        batch = self.recipe.batch
        self.accumulation = accumulation(batch.step_seconds, batch.max_rank_seconds, ranks.world_size)
        check_precision(self.recipe, ranks.device)
        self.record = Record(attempt, ranks.rank)
        mark("model", "start")
        vocabulary = vocabularies.of_run(self.run)
        built = build(self.recipe.backbone, seed=self.recipe.seed, vocabulary=vocabulary)
        model = learning.prepare(built, self.recipe)
        # Its file is for people, and has the accumulation of the launch; the number of ranks may have changed since.
        config = {**(rundir.read_json(self.run.deepspeed) or {}), "gradient_accumulation_steps": self.accumulation}
        mark("engine")
        self.engine = engine_for(model, self.recipe, self.accumulation, config, ranks)
        mark("meet")
        ranks.connect()
        self.hosts = ranks.gather(socket.gethostname())
        mark("packs")
        ranks.agree("the vocabulary", vocabulary.digest)
        if ranks.rank == 0:
            vocabularies.keep(vocabulary, self.run)
        # Every rank has dice of its own, for dropout and masks; weights and order come from the seed alone.
        set_seed(self.recipe.seed + ranks.rank)
        self.data = TrainingSet.open(self.recipe, model)
        self.sampler = self.data.sampler(self.recipe)
        self.evaluator = Evaluator(self.recipe, model, ranks)
        packs = [*self.data.utterances.packs, *self.evaluator.utterances.packs]
        self.check = BackgroundCheck(packs, slice(ranks.rank, None, ranks.world_size))
        self.evaluations = Evaluations(attempt, self.recipe, self.engine, ranks, self.evaluator)
        identity = Identity(
            world_size=ranks.world_size,
            zero_stage=str(self.recipe.zero_stage),
            precision=self.recipe.precision,
            backbone=learning.identity(self.recipe, vocabulary.digest),
            packs=self.data.utterances.digest,
            evaluation=self.evaluator.utterances.digest,
            order=self.sampler.identity(),
        )
        self.checkpoints = Checkpoints(
            attempt,
            self.engine,
            ranks,
            identity,
            self.recipe.checkpoint,
            vote_timeout_s=self.recipe.launch.deadlines.save,
            on_sealed=self._sealed,
            first=self.record.sync,
        )
        mark("restore")
        self.checkpoints.fence()
        restored, put_aside = self.checkpoints.restore(fresh)
        self.checkpoints.warm()
        self.progress = restored or Progress()
        self.sealed_step = -1 if restored is None else restored.step
        self.saving: Saving | None = None
        for problem in put_aside:
            self.record.event("put_aside", problem=problem)
        if self.checkpoints.lost:
            self.record.event("fell_back", step=self.sealed_step, lost=self.checkpoints.lost)
        self.record.track(self.recipe, self.sealed_step + 1)
        self.last_evaluation = time.monotonic()
        self.pace = Pace()
        self.look_again = 0.0
        self.unpublished = 0
        """Evaluations in a row whose result the disk did not take."""
        self.agreed_at: float | None = None
        """When all ranks last agreed on a step, while nothing but steps came after it."""
        self._mark_best()  # a kill may have come between the seal and the mark

    # The story ------------------------------------------------------------------------------------------------------

    def go(self) -> ExitCode:
        """Train to the last step, or to the step at which all ranks agreed to stop.

        Returns:
            FINISHED, or STOPPED with the work sealed. What `exit.json` says is the truth for the launcher.
        """
        progress = self.progress
        self.record.event(
            "started",
            step=progress.step,
            max_steps=self.recipe.max_steps,
            world_size=self.ranks.world_size,
            accumulation=self.accumulation,
            utterances=len(self.data.usable),
            left_out=self.data.left_out,
        )
        stopped = False
        for step in progress.awaiting:
            self.evaluations.give(step)
        if (
            progress.step == 0 and self.recipe.evaluate.at_start and progress.evaluated_step < 0
        ) or progress.evaluation_due:
            stopped = not self.evaluate()
        is_over = False
        while not is_over and not stopped:
            while progress.step < self.recipe.max_steps and not stopped and not self.ends_early:
                stopped = self.epoch()
            if not stopped and self.recipe.evaluate.at_end and progress.evaluated_step < progress.step:
                stopped = not self.evaluate()
            while self.sealed_step != progress.step:  # the third failure in a row raises
                self.save()
                self.settle()
            if progress.awaiting and not stopped:
                stopped = not self.await_evaluations()
            # What was waited for may say that the WER has fallen after all.
            is_over = progress.step >= self.recipe.max_steps or self.ends_early
        self.evaluations.close()
        code = ExitCode.STOPPED if stopped else ExitCode.FINISHED
        why = ""
        if self.ends_early and progress.step < self.recipe.max_steps and not stopped:
            why = why_early(progress.patience, self.recipe.evaluate)
            self.record.event("early_stopping", step=progress.step, why=why)
        if self.ranks.rank == 0:
            ended: dict[str, Any] = {"code": code, "step": progress.step, "sealed_step": self.sealed_step}
            # The batch script writes over what a launcher said that was only sent SIGTERM.
            ended |= {"asked": rundir.asked_to_stop(self.run) or self.asked} if stopped else {}
            rundir.write_json(self.attempt.exit, {**ended, "why": why} if why else ended)
        self.record.event("stopped" if stopped else "finished", step=progress.step)
        mark("leave", "save")
        self.record.close()
        self.ranks.close()
        return code

    def epoch(self) -> bool:
        """The rest of this epoch. Returns True when the ranks agreed to stop."""
        progress, recipe = self.progress, self.recipe
        mark("order", "step", progress.step)
        steps = self.begin_epoch()
        if not steps:
            progress.cursor.epoch, progress.cursor.history = progress.cursor.epoch + 1, []
            return False
        self.ranks.agree("the order of utterances", digest(steps))
        steps = steps[: recipe.max_steps - progress.step]
        mine = [b for step in steps for b in step[self.ranks.rank :: self.ranks.world_size]]
        load = partial(self._load, progress.cursor.epoch)
        feed = ahead(load, mine, depth=recipe.feed.ahead, threads=recipe.feed.threads)
        for step in steps:
            stop = self.one_step(step, feed)
            asked, save = self.save_asked, self.save_agreed
            if self.came is not None:
                self.take(*self.came)
            if progress.evaluation_due and not stop:
                stop = not self.evaluate()
            if stop or save or progress.step % recipe.checkpoint.every_steps == 0:
                self.save()
            if asked:
                self.run.save_request.unlink(missing_ok=True)
            if stop or self.ends_early:
                feed.close()
                return stop
        return False

    def begin_epoch(self) -> list[Step]:
        """The steps of this epoch that are left, of all ranks, in order; `one_step` makes each of them."""
        cursor = self.progress.cursor
        steps = self.sampler.steps_left(cursor, self.ranks.world_size, self.accumulation)
        self.steps_of_epoch = cursor.steps + len(steps)
        self.samples = self.data.samples_in(cursor.epoch).data  # of few at a time, far faster than NumPy
        return steps

    def one_step(self, step: Step, feed: Iterator[tuple[list[str], Tensors]]) -> bool:
        """One optimizer step over all ranks, or none, where its loss or gradient is not finite. Sets whether an
        evaluation is due and a save is wanted after it.

        Returns:
            True when any rank was asked to stop.
        """
        began = time.monotonic()
        progress, recipe, engine, ranks = self.progress, self.recipe, self.engine, self.ranks
        if self.agreed_at is None:
            engine.waits.take()  # of evaluations and saves
        mine = step[ranks.rank :: ranks.world_size]
        count = utterances_in(step)
        heard = self._gradient(mine, count, feed)
        rate = learning_rate(recipe.schedule, recipe.optimizer.learning_rate, progress.step, recipe.max_steps)
        mark("optimizer")
        with memory_errors(f"step {progress.step + 1}, in the optimizer", recipe):
            grad_norm = engine.step(rate)
        mark("agree")
        # Rank 0's clock and rank 0's view of the control directory decide for all.
        is_first = ranks.rank == 0
        asked = self._asked_for(began) if is_first else []
        stop = self.stop_flag[0] or self.run.stop_request.name in asked
        self.save_asked = self.run.save_request.name in asked
        done, of_epoch = progress.cursor.steps + 1, self.steps_of_epoch
        epochs = (progress.cursor.epoch + done / of_epoch, progress.cursor.epoch + (done - 1) / of_epoch)
        moment = Moment(progress.step + 1, *epochs, (time.monotonic() - self.last_evaluation) / 60)
        due = is_first and is_due(recipe.evaluate, moment, recipe.max_steps)
        loss: float = sum((sum(losses.tolist()) for _, losses in heard), 0.0)
        padded = sum(b.padded_s for b in mine if not b.filler)
        own_s = [0.0] * ranks.world_size
        own_s[ranks.rank] = time.monotonic() - (self.agreed_at or began) - engine.waits.take()
        came = self.evaluations.look()
        news = [0.0, 0.0, 0.0] if came is None else [1.0, came.step, self._wer_of(came)]
        to_say = [loss, float(stop), padded, float(self.checkpoints.done), float(due), float(self.save_asked), *news]
        loss_sum, stops, padded, saved, dues, saves, has_come, of_step, wer, *own_s = ranks.sum([*to_say, *own_s])
        self.agreed_at = time.monotonic()
        progress.evaluation_due, self.save_agreed = dues > 0, saves > 0
        self.came = (int(of_step), wer, came) if has_come else None
        progress.step += 1
        progress.cursor.advance(ranks.world_size, self.accumulation)
        epoch = progress.cursor.epoch
        ids = [i for utt_ids, _ in heard for i in utt_ids]
        self.record.ledger.append({"step": progress.step, "epoch": epoch, "ids": ids})
        left_out = math.isnan(grad_norm)
        if is_first:
            samples = sum(self.samples[i] for b in step if not b.filler for i in b.indices.tolist())
            metrics = {
                "step": progress.step,
                "epoch": epoch,
                "loss": loss_sum / count if math.isfinite(loss_sum) else None,
                "grad_norm": None if left_out else grad_norm,
                "learning_rate": rate,
                "utterances": count,
                "audio_s": round(samples / SAMPLE_RATE_HZ, 3),
                "padded_s": round(padded, 3),
                "step_s": round(time.monotonic() - began, 4),
                "time": round(time.time(), 3),
            }
            if engine.loss_scale is not None:
                metrics["loss_scale"] = engine.loss_scale
            if left_out:
                metrics["left_out"] = True
            self.record.step(metrics)
            if self.pace.add(own_s):
                self._tell_pace()
        self._count_left_out(left_out, loss_sum, heard)
        if saved == ranks.world_size:
            self.settle(over=True)
        if stops and is_first:
            self._control()  # a signal may have come before the look at what it was for
        return stops > 0

    def _asked_for(self, now: float) -> list[str]:
        """What is in the control directory, unless it was looked at just before."""
        if now < self.look_again:
            return []
        self.look_again = now + LOOK_S
        return self._control()

    def _control(self) -> list[str]:
        """What is in the control directory. Who asks for a stop is remembered: the next launcher removes the request,
        and may be waiting for us to seal."""
        names = rundir.names_in(self.run.stop_request.parent)
        if self.asked is None and self.run.stop_request.name in names:
            self.asked = rundir.asked_to_stop(self.run)
        return names

    def _gradient(
        self, mine: Step, count: int, feed: Iterator[tuple[list[str], Tensors]]
    ) -> list[tuple[list[str], Tensor]]:
        """The gradient of a step, left in the engine.

        Args:
            mine: this rank's micro-batches.
            count: utterances in the step, of all ranks.

        Returns:
            ids and losses, shape (batch,), of each micro-batch.
        """
        heard = []
        step = self.progress.step
        self.engine.begin(step)
        for number, batch in enumerate(mine):
            mark("data", "step", step + 1)
            with memory_errors(f"step {step + 1}, reading {len(batch.indices)} utterances", self.recipe):
                utt_ids, tensors = next(feed)
            mark("forward and backward")
            self.engine.model.begin(step, number)
            # Sum over utterances, over all ranks and all accumulation, divided by their number: the factor undoes
            # the engine's plain mean over ranks and micro-batches.
            factor = 0.0 if batch.filler else self.ranks.world_size * self.accumulation / count
            with memory_errors(batch_in_words(step + 1, batch, utt_ids, tensors), self.recipe):
                losses = self.engine.backward(tensors, factor, last=number == len(mine) - 1)
            if not batch.filler:
                heard.append((utt_ids, losses))
        return heard

    def _count_left_out(self, left_out: bool, loss_sum: float, heard: list[tuple[list[str], Tensor]]) -> None:
        """Record a step that all ranks left out, with the utterances that may be to blame, and end the run where there
        were too many in a row.

        fp16 finds out how far to scale the loss by gradients that overflow: those do not count.

        Raises:
            TrainingError: on all ranks.
        """
        progress, patience = self.progress, self.recipe.optimizer.nonfinite_patience
        if not left_out:
            progress.left_out_in_row = 0
            return
        progress.left_out += 1
        is_loss = not math.isfinite(loss_sum)
        counts = is_loss or self.recipe.precision != "fp16"
        progress.left_out_in_row += counts
        where, utterances = blame(self.ranks, heard)
        what = "the loss is not finite" if is_loss else "the gradient is not finite"
        message = f"step {progress.step}: {what} ({where})"
        in_row = progress.left_out_in_row
        self.record.event("left_out", step=progress.step, message=message, in_row=in_row, utterances=utterances)
        if counts and in_row > patience:
            self.settle()  # of a step that was sound
            raise TrainingError(
                f"{message}; so it was in {in_row} steps in a row, and optimizer.nonfinite_patience is {patience}",
                hint="look at these utterances; `speechctl resume RUN --set optimizer.learning_rate=…` goes on from the"
                " newest checkpoint, which is of before, with a lower one; so does optimizer.grad_clip",
            )

    def _tell_pace(self) -> None:
        slow = self.pace.slow
        if slow is None:
            self.record.event("straggler_gone", step=self.progress.step)
            return
        facts = {"own_s": round(slow.own_s, 4), "others_s": round(slow.others_s, 4), "factor": round(slow.factor, 2)}
        self.record.event("straggler", step=self.progress.step, rank=slow.rank, host=self.hosts[slow.rank], **facts)

    def _load(self, epoch: int, batch: MicroBatch) -> tuple[list[str], Tensors]:
        """In a thread of the feed, in any order: what is random follows from the epoch and the item alone."""
        self.check.complain()
        model, items = self.engine.model, batch.indices.tolist()
        examples = [self.data.example(item, epoch) for item in items]
        tensors = model.collate([e.waveform for e in examples], [e.text for e in examples])
        tensors = pad_to(tensors, round(batch.seconds * SAMPLE_RATE_HZ))
        tensors = model.augment(tensors, [self.data.dice(item, epoch) for item in items])
        return [e.utt_id for e in examples], tensors

    def evaluate(self) -> bool:
        """Evaluate now, or have it done beside training. Returns False when the ranks agreed to stop in the middle of
        it; it is then due at resume.

        Raises:
            StorageError: on all ranks, when this was the third in a row that the disk did not take.
        """
        progress = self.progress
        self.agreed_at = None
        self.settle()
        progress.evaluation_due = True
        self.record.event("evaluating", step=progress.step)
        mark("begin", "evaluate", progress.step)
        beside, outcome = self.recipe.evaluate.mode == "sidecar", None
        if not beside and (outcome := self.evaluations.now(progress.step, self._asked_to_stop)) is None:
            return False
        progress.evaluated_step, progress.evaluation_due = progress.step, False
        self.last_evaluation = time.monotonic()
        if outcome is not None:
            self.take(progress.step, self._wer_of(outcome), outcome if self.ranks.rank == 0 else None)
            self.unpublished = 0 if outcome.result is not None else self.unpublished + 1
            if self.unpublished == UNPUBLISHED:
                raise StorageError(
                    f"{UNPUBLISHED} evaluations in a row could not be published: {outcome.error}",
                    hint="make room there, or make it writable, then `speechctl resume RUN`",
                )
        elif self.sealed_step == progress.step:
            progress.awaiting.append(progress.step)
            self.evaluations.give(progress.step)
        else:
            progress.awaiting.append(progress.step)
            self.save()
        return True

    def _asked_to_stop(self) -> bool:
        asked = self.ranks.rank == 0 and self.run.stop_request.name in self._control()
        return asked or self.stop_flag[0]

    def judge(self, step: int, wer: float) -> None:
        """What an evaluation means for the best checkpoint and for early stopping; the same on all ranks."""
        progress, rules = self.progress, self.recipe.evaluate.early_stopping
        if step == 0:
            return
        if rules is not None:
            progress.patience = progress.patience.after(rules, wer)
        if wer < progress.best_wer:
            before = progress.best_wer, progress.best_step
            progress.best_wer, progress.best_step = wer, step
            if step != progress.step:  # evaluated beside training, and sealed: no save that fails takes it back
                self.saving = self.saving and replace(self.saving, best_before=(wer, step))
                self._mark_best()
            elif self.sealed_step == progress.step:
                self._mark_best()
            else:
                self.save(before)

    @property
    def ends_early(self) -> bool:
        return self.progress.patience.is_over(self.recipe.evaluate.early_stopping)

    def _wer_of(self, outcome: Outcome) -> float:
        """Infinite where there is none."""
        return math.inf if outcome.result is None else float(outcome.result["criterion"]["wer"])

    def take(self, step: int, wer: float, outcome: Outcome | None) -> None:
        """What came of an evaluation, at a step that all ranks agreed on.

        Args:
            outcome: all of it, on rank 0.
        """
        self.progress.awaiting = [s for s in self.progress.awaiting if s != step]
        if outcome is not None and outcome.result is not None:
            self.record.evaluated(outcome.result)
        elif outcome is not None:
            log = {"log": str(self.attempt.evaluation_log)} if self.recipe.evaluate.mode == "sidecar" else {}
            self.record.event("evaluation_failed", step=step, error=outcome.error, **log)
        if not math.isinf(wer):
            self.judge(step, wer)

    def await_evaluations(self) -> bool:
        """What is still evaluated beside training, at its end. Returns False when a rank was asked to stop."""
        mark("begin", "evaluate", self.progress.step)
        outcomes = self.evaluations.wait(self._asked_to_stop)
        for outcome in outcomes or ():
            self.take(outcome.step, self._wer_of(outcome), outcome if self.ranks.rank == 0 else None)
        return outcomes is not None

    def _mark_best(self) -> None:
        if self.ranks.rank != 0:
            return
        if self.progress.best_step <= 0:
            self.run.best.unlink(missing_ok=True)
            return
        with suppress(StorageError):  # the next attempt or the next best marks it; the checkpoint has it too
            rundir.write_json(self.run.best, {"step": self.progress.best_step, "wer": self.progress.best_wer})

    def save(self, best_before: tuple[float, int] | None = None) -> None:
        """Begin to save this step, unless it is sealed or on its way. One save is in flight at a time.

        Args:
            best_before: the best WER and its step, where this step is a new best; it is one once it is sealed.
        """
        progress = self.progress
        if self.sealed_step == progress.step or (self.saving and self.saving.step == progress.step):
            return
        self.agreed_at = None
        self.settle()
        if self.ranks.sum([float(not self.engine.is_sound())])[0]:
            raise TrainingError(
                f"step {progress.step}: the weights are not finite, and are not saved",
                hint="the newest checkpoint is sound: `speechctl resume RUN --set optimizer.learning_rate=…` goes on"
                " from it with a lower one",
            )
        began = time.monotonic()
        self.record.event("saving", step=progress.step)
        mark("begin", "save", progress.step)
        best_before = best_before or (progress.best_wer, progress.best_step)
        self.saving = Saving(progress.step, began, best_before)
        self.checkpoints.begin(progress)
        if not self.checkpoints.asynchronous:
            self.settle()

    def _sealed(self, outcome: Saved) -> None:
        """Rank 0's record of a durable checkpoint. In the committer's thread: training may be anywhere."""
        assert self.saving is not None
        durable_s = time.monotonic() - self.saving.began
        blocked_s = self.checkpoints.copy_s if self.checkpoints.asynchronous else durable_s
        times = {"blocked_s": round(blocked_s, 3), "durable_s": round(durable_s, 3)}
        self.record.event("sealed", step=outcome.step, bytes=outcome.bytes, **times)

    def settle(self, *, over: bool = False) -> None:
        """Wait for the save in flight, if there is one. A failure is recorded, and training goes on.

        Args:
            over: it has come to its end on all ranks, so that nobody waits: the deadline of a step goes on, where that
                of a save would hide a hang for much longer.
        """
        if self.saving is None:
            return
        self.agreed_at = None
        if not over:
            mark("begin", "save", self.saving.step)
        outcome, saving = self.checkpoints.settle(), self.saving
        self.saving = None
        if outcome.trouble:
            self.record.event("trouble_after_seal", step=outcome.step, problem=outcome.trouble)
        if outcome.error:
            self.progress.best_wer, self.progress.best_step = saving.best_before
            self.record.event("save_failed", step=outcome.step, error=outcome.error)
            if outcome.step in self.progress.awaiting:
                lacks = Outcome(outcome.step, None, "its checkpoint could not be saved")
                self.take(outcome.step, math.inf, lacks if self.ranks.rank == 0 else None)
            return
        self.sealed_step = outcome.step
        if outcome.step in self.progress.awaiting:
            self.evaluations.give(outcome.step)
        if self.progress.best_step != saving.best_before[1]:
            self._mark_best()


def run(attempt_dir: Path, stop_flag: list[bool], fresh: bool) -> ExitCode:
    return Training(Attempt(attempt_dir), stop_flag, fresh).go()
