"""What is saved, and what is checked on load.

One format for every world size and ZeRO stage. Each rank writes the stretches of parameters that it keeps (`Piece`),
with their fp32 weights and optimizer state, into a safetensors file of its own; a reader puts stretches together as its
own topology needs them. On the same topology a run continues bit for bit, because bits are all that is stored.

    checkpoints/step-00000120/
        rank-00000.safetensors    weight/NAME, exp_avg/NAME … [elements], the header says where each starts; rng/cpu;
                                  of the first rank the model's buffers too, as buffer/NAME
        state.json                step, rows, digests, settings, sizes and sha256 of the files, and of itself; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.store.sealed import sealed, unsealed
from pipelines.training.ranks import Ranks
from pipelines.training.zero import ZeroEngine

FORMAT_VERSION = 2
STATE = "state.json"
SCALARS = ("step",)  # what optimizers count for each tensor; all else they keep has the tensor's shape


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: `keep` of them, for a run that is made from what `digests` name.

    earlier: the same things' digests as earlier versions of this program took them.
    """

    folder: Path
    ranks: Ranks
    digests: Mapping[str, str]
    earlier: Mapping[str, str] = field(default_factory=dict)
    keep: int = 2
    on_saved: Callable[[Path], None] | None = None

    def save(self, engine: ZeroEngine, progress: Mapping[str, Any]) -> Path:
        """Write the state after `progress["step"]` updates, publish it by rename, drop the oldest. All ranks call it.

        Raises Refusal in every rank where one of them cannot write.
        """
        final = self.folder / f"step-{progress['step']:08d}"
        draft = self.folder / f".{final.name}.writing"
        if self.ranks.is_first:
            shutil.rmtree(draft, ignore_errors=True)
            _attempt(lambda: draft.mkdir(parents=True))
        self.ranks.wait()
        path = draft / f"rank-{self.ranks.rank:05d}.safetensors"
        outcome = _attempt(lambda: _write_rank(path, engine, self.ranks))
        outcomes = self.ranks.gather_objects(outcome)
        self._raise_first(outcomes, final)
        if self.ranks.is_first:
            files = {f"rank-{rank:05d}.safetensors": outcome for rank, outcome in enumerate(outcomes)}
            state = {"version": FORMAT_VERSION, **progress, "digests": dict(self.digests), "files": files}
            outcome = _attempt(lambda: self._publish(draft, final, state))
        self._raise_first(self.ranks.gather_objects(outcome), final)
        if self.ranks.is_first and self.on_saved is not None:
            self.on_saved(final)
        return final

    def newest(self, log: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose files are as written; `say` hears of each that is passed over.

        Every rank checks its share of the files and all come to the same answer. Raises Refusal for a checkpoint
        of another model, data or tokenizer.
        """
        if self.ranks.is_first:
            for torn in self.folder.glob(".step-*"):
                shutil.rmtree(torn, ignore_errors=True)
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            problem = self._problem(path)
            problems = [str(found) for found in self.ranks.gather_objects(problem) if found is not None]
            if not problems:
                return Checkpoint(path)
            log(f"checkpoint {path.name} is passed over: {problems[0]}")
        return None

    def end(self, figures: Mapping[str, Any], *, keep: bool) -> None:
        """Note that the run has come to its end with these figures; unless `keep`, drop the checkpoints."""
        if self.ranks.is_first:
            draft = self._ending.with_suffix(".writing")
            draft.write_text(json.dumps(sealed({"digests": dict(self.digests), "figures": figures}), indent=1))
            os.replace(draft, self._ending)
            if not keep:
                shutil.rmtree(self.folder, ignore_errors=True)
        self.ranks.wait()

    def ended(self) -> dict[str, Any] | None:
        """The figures of a run that came to its end here. Raises Refusal where it was another run, or the note of
        its end is not as it was written."""
        self.ranks.wait()  # so that all ranks see the same files
        if not self._ending.exists():
            return None
        note = unsealed(self._ending)
        if note is None:
            raise Refusal(self._ending, NO_VALUE, "is not what was written", "delete it, and the run ends anew")
        self._refuse_others(self._ending, note["digests"])
        return dict(note["figures"])

    @property
    def _ending(self) -> Path:
        return self.folder.parent / "logs" / "finished.json"

    def _problem(self, path: Path) -> str | None:
        state = unsealed(path / STATE)
        if state is None:
            return f"its {STATE} is missing or not what was written"
        if state["version"] != FORMAT_VERSION:
            return f"its format is version {state['version']}, and this program reads version {FORMAT_VERSION}"
        self._refuse_others(path, state["digests"])
        for number, (name, record) in enumerate(sorted(state["files"].items())):
            if number % self.ranks.world_size != self.ranks.rank:
                continue
            file = path / name
            if not file.is_file() or file.stat().st_size != record["bytes"]:
                return f"its {name} is missing or cut"
            if _sha256(file) != record["sha256"]:
                return f"its {name} has another sha256 than was written"
        return None

    def _refuse_others(self, path: Path, saved: Mapping[str, str]) -> None:
        for name in sorted({*saved, *self.digests}):
            here, there = self.digests.get(name), saved.get(name)
            if there not in (here, self.earlier.get(name, here)):
                raise Refusal(
                    path,
                    NO_VALUE,
                    f"is of another run: its {name} has the digest {there}, and this run's is {here}",
                    f"give the {name} that it began with, or begin a new run in another folder",
                )

    def _publish(self, draft: Path, final: Path, state: Mapping[str, Any]) -> None:
        with open(draft / STATE, "w") as file:
            json.dump(sealed(state), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _discard(final)  # left by an attempt that was passed over
        os.rename(draft, final)
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            _discard(old)

    def _raise_first(self, outcomes: list[object], final: Path) -> None:
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, str):
                kept = sorted(path.name for path in self.folder.glob("step-*"))
                raise Refusal(
                    final,
                    NO_VALUE,
                    f"rank {rank} could not write the checkpoint ({outcome})",
                    "make room or make the folder writable, then run the same command again; it continues from "
                    f"{kept[-1] if kept else 'the start'}",
                )


@dataclass
class Checkpoint:
    """A saved run, read a stretch at a time."""

    path: Path

    def __post_init__(self) -> None:
        self.state: dict[str, Any] = json.loads((self.path / STATE).read_text())
        self._files: dict[str, Any] = {}
        # For each parameter, the files that hold stretches of it and where each stretch begins.
        self._parts: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self._scalars: dict[str, dict[str, float]] = {}
        for name in self.state["files"]:
            file = self._files[name] = safe_open(self.path / name, "pt")
            header = json.loads(file.metadata()["pieces"])
            for parameter, record in header.items():
                self._parts[parameter].append((name, record["start"]))
                self._scalars[parameter] = record["scalars"]

    @torch.no_grad()
    def load_weights(self, model: nn.Module) -> None:
        """Fill the trained parameters and the buffers of a model that no engine has taken yet."""
        stored = self._files["rank-00000.safetensors"]
        for name, buffer in model.named_buffers():
            if f"buffer/{name}" in stored.keys():  # noqa: SIM118
                buffer.copy_(stored.get_tensor(f"buffer/{name}"))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(self._read("weight", name, 0, parameter.numel()).view(parameter.shape))

    @torch.no_grad()
    def load_optimizer(self, engine: ZeroEngine) -> None:
        """Fill the optimizer's state in this rank."""
        for piece in engine.pieces():
            state = engine.optimizer.state[piece.owner]
            for kind in self._kinds(piece.name):
                if kind not in state:
                    state[kind] = torch.zeros_like(piece.owner)
                part = state[kind].view(-1).narrow(0, piece.offset, piece.weight.numel())
                part.copy_(self._read(kind, piece.name, piece.start, part.numel()))
            for kind, value in self._scalars[piece.name].items():
                state[kind] = torch.tensor(value, dtype=torch.float32, device=piece.owner.device)

    def load_random_state(self, ranks: Ranks) -> bool:
        """Go on with this rank's random numbers; False where the checkpoint is of another number of ranks."""
        if self.state["world_size"] != ranks.world_size:
            return False
        file = self._files[f"rank-{ranks.rank:05d}.safetensors"]
        torch.set_rng_state(file.get_tensor("rng/cpu"))
        if ranks.device.type == "cuda" and "rng/cuda" in file.keys():  # noqa: SIM118  (a file is no mapping)
            torch.cuda.set_rng_state(file.get_tensor("rng/cuda"))
        return True

    def _kinds(self, name: str) -> list[str]:
        file = self._files[self._parts[name][0][0]]
        kinds = (key.split("/", 1) for key in file.keys())  # noqa: SIM118
        return sorted(kind for kind, parameter in kinds if parameter == name and kind != "weight")

    def _read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements start … start + numel of a parameter's weights or state, from wherever they lie."""
        out = torch.empty(numel)
        found = 0
        for file, first in self._parts[name]:
            stored = self._files[file].get_slice(f"{kind}/{name}")
            low, high = max(start, first), min(start + numel, first + stored.get_shape()[0])
            if low < high:
                out[low - start : high - start] = stored[low - first : high - first]
                found += high - low
        if found != numel:
            raise Refusal(
                self.path,
                NO_VALUE,
                f"holds {found:,} of the {numel:,} elements of {name} that this run needs: it was written for a model with "
                "other shapes",
                "begin a new run in another folder",
            )
        return out


def _write_rank(path: Path, engine: ZeroEngine, ranks: Ranks) -> dict[str, Any]:
    tensors, header = {"rng/cpu": torch.get_rng_state()}, {}
    if ranks.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    if ranks.is_first:
        tensors |= {f"buffer/{name}": _own(buffer) for name, buffer in engine.buffers()}
    for piece in engine.pieces_to_write():
        tensors[f"weight/{piece.name}"] = _own(piece.weight)
        state = engine.optimizer.state[piece.owner]
        scalars = {}
        for kind, value in state.items():
            if kind in SCALARS:
                scalars[kind] = float(value)
            else:
                part = value.view(-1).narrow(0, piece.offset, piece.weight.numel())
                tensors[f"{kind}/{piece.name}"] = _own(part)
        header[piece.name] = {"start": piece.start, "shape": list(piece.shape), "scalars": scalars}
    save_file(tensors, path, metadata={"pieces": json.dumps(header)})
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _own(stretch: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU: safetensors refuses tensors that share memory."""
    return stretch.detach().to("cpu", copy=True)


def _attempt(write: Callable[[], Any]) -> Any:
    """What `write` returns, or the text of the error that kept it from writing."""
    try:
        return write()
    except (OSError, SafetensorError) as error:
        return str(error) or type(error).__name__


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _discard(folder: Path) -> None:
    """Delete a checkpoint so that one killed half-way is never taken for whole."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.deleting")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
