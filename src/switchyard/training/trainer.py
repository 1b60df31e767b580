"""Trains one run from where it stands to its end: steps, records, evaluation, checkpoints, a clean stop on a signal."""

import contextlib
import functools
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.finite import REMEDY
from switchyard.checkpoint.health import Healthy
from switchyard.checkpoint.layout import full_shape_of
from switchyard.config import Config
from switchyard.data import Data
from switchyard.distributed import progress
from switchyard.distributed.compiled_graph import exchanged, sums_may_race
from switchyard.distributed.mesh import LocalMesh
from switchyard.distributed.processes import (
    RACING,
    waits_for_nothing,
)
from switchyard.distributed.replicas import check_replicas
from switchyard.errors import Interrupted, UserError
from switchyard.json_text import to_json
from switchyard.moe.routing.replay import Recorder
from switchyard.training.bad_losses import BadLosses
from switchyard.training.compile_cache import compile_cache
from switchyard.training.cost import CostMeter
from switchyard.training.evaluate import Evaluation, create_evaluator, evenly_spaced
from switchyard.training.finite import check_evaluation, check_step
from switchyard.training.loggers import open_loggers
from switchyard.training.metrics import Clock, MetricsLog, Progress, exchange_line, load_range, train_figures
from switchyard.training.micro_batches import forces_choices
from switchyard.training.randomness import NOISE_RULE, draw_noise, random_state
from switchyard.training.resume import (
    KEPT,
    RESULT,
    agreed,
    newest,
)
from switchyard.training.router_metrics import MOST_SHOWN, layer_line
from switchyard.training.router_schedule import forced_choices, routers_learn
from switchyard.training.sample import NOWHERE, SAMPLE, create_sampler
from switchyard.training.saver import Content, Saver
from switchyard.training.schedule import learning_rate
from switchyard.training.signals import StopSignals
from switchyard.training.step import TrainStep
from switchyard.training.watchdog import Watchdog


class Trainer:
    """Trains one run from where it stands to its end.

    Args:
        config: the whole configuration.
        run: the run folder, which exists.
        data: what to train on.
        step: set to the state to start from.
        state: of the checkpoint that it comes from; None for a new run.
        mesh: its processes run this with the same configuration; the first writes the run folder.
        resume: whether the run goes on, be it from its beginning.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        data: Data,
        step: TrainStep,
        state: dict[str, Any] | None,
        mesh: LocalMesh,
        resume: bool = False,
    ):
        self.config, self.run, self.data, self.model, self.step = config, run, data, step.model, step
        self.mesh, self.processes, self.parameters = mesh, mesh.processes, step.size
        train, state = config.train, state or {"step": 0, "seconds": 0.0}
        self.done, self.healthy = state["step"], Healthy()
        self.start, self.start_index = self.done, data.train.course.index
        self.start_tokens = state.get("tokens")
        self.saved = self.compared = self.done  # the newest steps that need no saving, and no look at the replicas
        self.kept = {name: state[name] for name in KEPT if name in state}
        if self.kept and not (resume and checkpoint.listed(run)):
            self.saved = -1  # before the first step, so that --resume always finds the weights that the run began with
        self.clock = Clock(seconds=state["seconds"], mark_seconds=state["seconds"])
        best = checkpoint.best(run)
        self.best_loss = best[1] if best and best[0].name <= checkpoint.name_of(self.done) else math.inf
        self.tokens_per_step = config.micro_batches * config.predictions
        if self.start_tokens is None:  # a new run, or one of an earlier version, whose steps were all alike
            self.start_tokens = self.done * self.tokens_per_step
        self.evaluator = None
        if mesh.evaluates:
            tokens_per_byte = data.validation_tokens / data.validation_bytes
            self.evaluator = create_evaluator(step.model, step.config, tokens_per_byte, mesh=mesh)
        self.validation = data.validation()
        self.sample = evenly_spaced(len(self.validation), train.eval_batches)
        self.sampler = create_sampler(step.model, config, data, mesh)
        self.progress = Progress(train.steps, self.done, config.unit)
        loggers = functools.partial(open_loggers, config, run, say=self.progress.say)
        self.metrics = MetricsLog(run, self.done, self.processes.is_first, config.moe_layers, loggers)
        self.compile_seconds: float | None = None
        record = config.moe.record
        self.recorder = None
        if record and self.processes.is_first:
            self.recorder = Recorder(record, config, "training", self.done, resume)
        self.forced = forced_choices(config)
        self.bad, self.cost = BadLosses(config, state), CostMeter(config, step.shapes, self.processes.size)
        self.saver = Saver(run, config, self.healthy, self.processes, self._warn_of_lost)
        board = progress.Board.of_job(self.processes.rank) if train.stall_seconds else None
        self.watchdog = Watchdog(train.stall_seconds, self.done, board)
        self.met_at, self.late = time.perf_counter(), 0.0  # the last meeting of the ranks; seconds from it to the step
        if self.bad.rule == "rewind" and not self.done:
            self.saved = -1  # there is always a checkpoint to go back to

    def run_to_end(self, stop: StopSignals) -> dict[str, Any]:
        """Steps until train.steps, then evaluates over the whole validation set and writes result.json."""
        train = self.config.train
        with self.metrics, contextlib.closing(self.progress), self.saver, self.watchdog:
            self._announce()
            if train.async_checkpoint and self.done < train.steps:
                self.saver.prepare(*self._arrays())
            self._save()
            if 0 < self.done < train.steps and self._is_due(train.sample_every):
                self._write_sample()  # a signal or a kill may have come before it
            if 0 < self.done < train.steps and self._is_due(train.eval_every):
                self._evaluate_sample(stop)  # a signal or a kill may have come in the middle of it
            while self.done < train.steps:
                gone_back = self._advance()
                if not gone_back and self._is_due(train.replica_check_every):
                    self._compare_replicas()
                self._stop_if_asked(stop)
                if gone_back:
                    continue  # to a checkpoint, after which everything was done that is due there
                if self._is_due(train.sample_every) and self.done < train.steps:
                    self._write_sample()
                if self._is_due(train.eval_every) and self.done < train.steps:
                    self._evaluate_sample(stop)
                if self._is_due(train.checkpoint_every):
                    self._save()
            self._save_surely()
            self._write_sample()
            result = self._result(self._validate(stop) if self.evaluator else None)
            if self.processes.is_first:
                checkpoint.write_atomically(self.run / RESULT, to_json(result, indent=1))
            self.progress.say(f"done: {self.run / RESULT}")
            return result

    def note_changes(self, changes: dict[str, tuple[Any, Any]], other_data: str | None) -> None:
        """Records what a resumed run does otherwise from here on; nothing where nothing changed."""
        if changes or other_data:
            line = {"kind": "resumed", "step": self.done, "changes": {key: list(pair) for key, pair in changes.items()}}
            self.metrics.write(line | {"data": other_data})
        if other_data:
            self.best_loss = math.inf  # of other data

    def _announce(self) -> None:
        say, config = self.progress.say, self.config
        say(f"run: {self.run}" + (f", resumed after step {self.done}" if self.done else ""))
        say(f"data: {self.data.description}")
        pace = f"{self.tokens_per_step:,} {config.unit} a step, {config.train.steps:,} steps"
        say(f"model: {self.parameters:,} parameters; {pace}")
        if config.train.sample_every and self.sampler is None:
            say(NOWHERE.format(every=config.train.sample_every))
        if config.context.mode == "graph" and self.done < config.train.steps:
            conditional = len(config.moe_layers)  # the model's width is of no consequence
            seconds = 1.0 + 0.7 * (config.model.num_layers - conditional) + 2.0 * conditional
            say(f"compiling the training step: takes about {seconds:.0f} s on two CPU cores")

    def _advance(self) -> bool:
        """Makes one optimizer step and writes its line where one is due; returns whether the run has gone back."""
        started = time.perf_counter()
        if self.compiles:
            self.watchdog.pause()
        else:
            self.watchdog.beat(progress.DATA, self.done)
        rate, (tokens, *inputs) = learning_rate(self.config, self.done + 1), self._inputs()
        replay = self._forced(tokens)
        cache = compile_cache(self.config, self.step.shapes, self.progress.say) if self.compiles else nullcontext()
        read = time.perf_counter()
        self.late = 0.0 if self.compiles else read - self.met_at
        if not self.compiles:
            self.watchdog.beat(progress.STEP)
        with cache:
            options = (replay, routers_learn(self.config, self.done), self.bad.limit)
            figures = self.step(tokens, *inputs, rate, *options)  # waits for it
        self.watchdog.beat(progress.WAIT)
        ended = time.perf_counter()
        if fault := self.bad.fault(figures):
            return self._go_on_after(fault, tokens, figures)
        if math.isfinite(figures["loss"]):
            self.bad.note(figures["loss"])
        self._record(tokens, figures)
        self.done += 1
        self.progress.advance()
        if self.compile_seconds is None:
            self._note_first(ended - started)
        else:
            self.clock.add(ended - started)
            self.cost.add("data", read - started)
            self.cost.add("compute", ended - read)
        if self.done == 1 or self._is_due(self.config.train.log_every):
            self._log(figures, rate)
        return False

    def _note_first(self, seconds: float) -> None:
        """Notes the step that has compiled the program, and what it exchanges."""
        self.compile_seconds = seconds
        if self.config.context.mode == "graph":
            self.progress.say(f"compiled and ran step {self.done} in {seconds:.1f} s")
        self._say_what_travels()

    def _log(self, figures: dict[str, Any], rate: float) -> None:
        """Writes the line of a step."""
        speed = self.clock.rate(self.tokens_per_step)
        self.cost.add("saving", self.saver.seconds - self.cost.seconds["saving"])
        line = train_figures(self.done, figures, rate, speed) | self.cost.figures(speed)
        if self.config.model.compute_dtype != "float16":
            del line["loss_scale"], line["skipped"]
        if self.config.data.mixture:
            line["corpora"] = self.data.train.counts(self._read())
        self.metrics.write(line)
        self.progress.say(self.progress.train_line(line))

    def _go_on_after(self, fault: str, tokens: np.ndarray, figures: dict[str, Any]) -> bool:
        """Does what train.on_bad_loss says after a step with a bad loss; returns whether the run has gone back.

        Raises:
            UserError: the rule ends the run, or its limit is reached, or the update was applied and no checkpoint is
                there to go back to.
        """
        step, rule = self.done + 1, self.bad.rule
        self.saver.wait()
        applied = rule == "skip" and not figures["skipped"]  # by a compiler's step, which reads no loss
        if rule == "stop" or applied:
            check_step(step, figures["loss"], figures, self._kept)
            raise UserError(f"train.on_bad_loss: {rule}; the {fault} at step {step}; {self._kept()}; {REMEDY}")
        self.bad.permit(step, fault, self._kept())
        line = {"step": step, "number": self.bad.count, "fault": fault, "loss": float(figures["loss"])}
        if rule == "rewind":
            return self._rewind(line)
        self._record(tokens, figures)
        self.done = step
        self.progress.advance()
        self.metrics.write({"kind": "skipped", **line})
        most = self.config.train.max_bad_losses
        self.progress.say(f"warning: step {step}: the {fault}; its batch was skipped ({self.bad.count} of {most})")
        return False

    def _rewind(self, line: dict[str, Any]) -> bool:
        """Goes back to the newest good checkpoint, and on with the data after those of the bad step."""
        following = self._read() + self.config.micro_batches
        loaded = agreed(newest(self.run, self.config), self.run, self.config, self.processes)
        if loaded is None:
            raise UserError(f"train.on_bad_loss: rewind; the {line['fault']} at step {line['step']}; {self._kept()}")
        self.step.load(loaded.weights, loaded.optimizer)
        self.done = self.start = self.saved = self.compared = loaded.step
        self.start_index, self.start_tokens = following, loaded.state.get("tokens", self.done * self.tokens_per_step)
        self.bad.restart(loaded.state)
        self.metrics.rewind(self.done)
        line |= {"kind": "rewound", "step": self.done, "bad_step": line["step"], "data_index": following}
        self.metrics.write(line)
        most = self.config.train.max_bad_losses
        self.progress.say(
            f"warning: step {line['bad_step']}: the {line['fault']}; the run goes back to step {self.done} and on with "
            f"micro-batch {following} of the data ({self.bad.count} of {most})"
        )
        return True

    @property
    def compiles(self) -> bool:
        """Returns whether the next step compiles the program."""
        return self.compile_seconds is None and self.config.context.mode == "graph"

    def _forced(self, tokens: np.ndarray) -> np.ndarray | None:
        """Returns this process's part of the choices that are forced in the next step, [A, M, N, K] int32 of tokens
        [A, B, S]; -1 where the routers decide, None in a run that forces none."""
        if not forces_choices(self.config):
            return None
        replay = self.forced.at(self.done, self.processes.full(tokens, 1))
        if replay is None:
            config = self.config
            shape = (config.micro_batches, len(config.moe_layers), config.rows, config.moe.choices)
            replay = np.full(shape, -1, np.int32)
        return self.processes.part(replay, 2)

    def _record(self, tokens: np.ndarray, figures: dict[str, Any]) -> None:
        """Keeps the choices of a step, of all processes."""
        if self.config.moe.record:
            tokens = self.processes.full(tokens, 1)
            if self.recorder:
                self.recorder.add(self.done, tokens, figures["choices"])

    def _say_what_travels(self) -> None:
        """Says what the compiled step exchanges, and whether it does so safely."""
        races = waits_for_nothing(self.config, self.processes)
        if graph := self.mesh.compiled_graph(self.step.program):
            travels, races = exchanged(graph), races and sums_may_race(graph)
            self.metrics.write({"kind": "exchanges", "step": self.done, **travels})
            self.progress.say(exchange_line(travels))
        if races:
            self.progress.say(RACING.format(every=self.config.train.replica_check_every))

    def _inputs(self) -> tuple[np.ndarray, ...]:
        """Returns tokens, labels, valid [A, B, S] and noise [A, max(J, 1), N, D] of the next step."""
        count, seed = self.config.micro_batches, self.config.train.seed
        first = self._read()
        batches = [self.data.train.at(first + micro) for micro in range(count)]
        tokens, labels, valid = (np.stack(part) for part in zip(*batches))  # [A, B, S] each
        slices, width, size = self.model.noise_slices, self.config.model.hidden_size, self.config.data.batch_size
        own = self.processes.part(np.arange(size), 0)  # the sequences that this process reads
        own = range(own[0], own[-1] + 1)
        noise = draw_noise(seed, self.done, count, slices, own, self.config.rows // size, width)
        return tokens, labels, valid, noise

    def _read(self) -> int:
        """Returns the number of micro-batches that the run has read."""
        return self.start_index + (self.done - self.start) * self.config.micro_batches

    def _tokens(self) -> int:
        """Returns the number of predictions that the run has made in training."""
        return self.start_tokens + (self.done - self.start) * self.tokens_per_step

    def _is_due(self, every: int) -> bool:
        return bool(every) and self.done % every == 0

    def _stop_if_asked(self, stop: StopSignals) -> None:
        """Lets the ranks meet after a step: ends the run if one of them was asked to, and ends a save that is done."""
        came = time.perf_counter()
        met = self.processes.gather(np.array([stop.came, self.saver.state, self.late]))  # [ranks, 3]
        self.met_at = time.perf_counter()
        self.cost.met(met[:, 2], self.met_at - came)
        self.saver.collect(met[:, 1])
        if met[:, 0].any():
            self._save_surely()
            raise Interrupted(f"saved step {self.done} of '{self.run}'; continue with --resume")

    def _evaluate_sample(self, stop: StopSignals) -> None:
        """Scores train.eval_batches batches, unless a run that was killed did; weights that are the best so far are
        saved, see train.save_best."""
        loss = self.metrics.evaluated(self.done, len(self.sample) == len(self.validation))
        if loss is None:
            loss = self._evaluate(self.sample, stop).loss
        if self._is_best(loss):
            before, self.best_loss = self.best_loss, loss
            self._save()
            self.saver.wait()
            if self.saver.lost == self.done:
                self.best_loss = before
                return
            self._mark_best(loss)

    def _write_sample(self) -> None:
        """Samples a text and writes it down, unless a run that was killed did, or none is sampled."""
        if self.sampler is None or self.metrics.holds(SAMPLE, self.done):
            return
        if not self.sampler.is_compiled and self.config.context.mode == "graph":
            self.progress.say("compiling the sampling of text")
        self.watchdog.pause()  # however long the text is; the next step is watched again
        line = self.sampler(self.done)
        self.metrics.write(line)
        self.progress.say(f"step {self.done}/{self.config.train.steps}  sample {line['prompt']!r} -> {line['text']!r}")

    def _evaluate(self, places: list[int], stop: StopSignals) -> Evaluation:
        """Scores some batches of the validation set and writes the line."""
        if not self.evaluator.is_compiled and self.config.context.mode == "graph":
            self.progress.say("compiling the evaluation")
        batches = (self.validation.at(place) for place in places)
        self.watchdog.pause()  # the first batch may compile
        found = self.evaluator(batches, lambda index: self._after_batch(stop))
        part = "" if len(places) == len(self.validation) else f" on {len(places)} of {len(self.validation)} batches"
        self.progress.say(
            f"step {self.done}/{self.config.train.steps}  validation loss {found.loss:.4f} "
            f"({found.loss_ci95[0]:.4f}..{found.loss_ci95[1]:.4f})  {found.headline}{part}"
        )
        for layer in found.layers:
            self.progress.say(layer_line(layer, MOST_SHOWN))
        self.metrics.write({"kind": "evaluation", "step": self.done, "whole": not part, **found.to_dict()})
        self.metrics.flush()
        return found

    def _after_batch(self, stop: StopSignals) -> None:
        """Does what is due after a batch of an evaluation."""
        self.watchdog.beat(progress.EVALUATE)
        if self.processes.size == 1:  # of several, one that stops here would leave the others waiting
            self._stop_if_asked(stop)

    def _save_surely(self) -> None:
        """Writes a checkpoint of this step, and returns when it is there."""
        self._save()
        self.saver.wait()
        if self.saver.lost == self.done:
            self.saved = -1
            self._save(must=True)

    def _warn_of_lost(self, step: int, fault: str) -> None:
        """Says that a checkpoint could not be written, in the log and in the metrics."""
        self.progress.say(f"warning: the checkpoint of step {step} was not written: {fault}; the run goes on")
        self.metrics.write({"kind": "save_failed", "step": step, "fault": fault})

    def _save(self, must: bool = False) -> None:
        """Writes a checkpoint of this step, if there is none yet; see `Saver.save`."""
        if self.saved == self.done:
            return
        self.watchdog.beat(progress.SAVE)
        if self.recorder and self.done:
            self.recorder.save()
        config = self.config
        epoch, window = self.data.train.course.after(self._read())
        state = {
            "step": self.done,
            "data_index": self._read(),
            "data_epoch": epoch,
            "data_window": window,
            "corpus": self.data.fingerprint,
            "tokens": self._tokens(),
            "train_seed": config.train.seed,
            "noise_rule": NOISE_RULE,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "seconds": self.clock.seconds,
            **self.bad.state(),
            **self.kept,
        }
        weights, optimizer = self._arrays()
        self._compare_replicas(weights | optimizer)  # what is saved has been seen to be right
        self.metrics.flush()
        self.saver.save(Content(self.data.tokenizer.to_json(), weights, optimizer, state, self.step.shapes), must)
        self.saved = self.done

    def _arrays(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Returns (weights, optimizer's state) by name, as this process holds them."""
        weights = {parameter.name: parameter.asnumpy() for parameter in self.model.get_parameters()}
        return weights, {name: parameter.asnumpy() for name, parameter in self.step.optimizer_state().items()}

    def _compare_replicas(self, arrays: dict[str, np.ndarray] | None = None) -> None:
        """Ends the run where processes that must hold the same do not (UserError), unless this step was seen to."""
        if self.processes.size == 1 or not self.config.train.replica_check_every or self.compared == self.done:
            return
        if arrays is None:
            weights, optimizer = self._arrays()
            arrays = weights | optimizer
        arrays = arrays | {"random state": random_state(self.config.train.seed, self.done)}
        known, degrees = self.step.shapes, self.processes.degrees
        shapes = {name: known.get(name) or known.get(name.partition(".")[2]) for name in arrays}
        shapes = {name: shape or full_shape_of(name, arrays[name].shape, degrees) for name, shape in shapes.items()}
        check_replicas(arrays, shapes, self.processes, self.done, self._kept)
        self.compared = self.done

    def _kept(self) -> str:
        """Names the newest good checkpoint, for a message."""
        return self.healthy.kept(self.run)

    def _is_best(self, loss: float) -> bool:
        """Returns whether the weights of a loss are to be kept as the best so far."""
        return self.config.train.save_best and loss < self.best_loss

    def _mark_best(self, loss: float) -> None:
        """Names the checkpoint of this step as the best."""
        if self.processes.is_first:
            checkpoint.mark_best(self.run, self.done, loss)

    def _validate(self, stop: StopSignals) -> Evaluation:
        """Scores the whole validation set, and marks the best checkpoint."""
        full = len(self.sample) == len(self.validation)
        if self.config.train.eval_every and not full:
            self._evaluate_sample(stop)  # comparable with those before it
        found = self._evaluate(evenly_spaced(len(self.validation), 0), stop)
        check_evaluation(found.to_dict(), f"step {self.done} of '{self.run}'", REMEDY)
        if (full or not self.config.train.eval_every) and self._is_best(found.loss):
            self._mark_best(found.loss)
        return found

    def _result(self, found: Evaluation | None) -> dict[str, Any]:
        """Returns what result.json holds: the run in figures; seconds are of steps alone, over all resumptions."""
        best, layers = checkpoint.best(self.run), found.layers if found else ()
        figures = found.to_dict() if found else {"loss": None, "tokens": 0}
        low, high = load_range(np.array([layer["load"] for layer in layers])) if layers else (None, None)  # of [M, E]
        return {
            "name": self.config.train.name,
            "steps": self.done,
            "seconds": self.clock.seconds,
            "compile_seconds": self.compile_seconds,
            "tokens_per_second": self._tokens() / self.clock.seconds if self.clock.seconds else None,
            "parameters": self.parameters,
            "validation_loss": figures.pop("loss"),
            "validation_tokens": figures.pop("tokens"),
            **figures,
            "load_min": low,
            "load_max": high,
            "checkpoint": checkpoint.name_of(self.done),
            "best_checkpoint": best[0].name if best else None,
        }
