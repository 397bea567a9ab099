"""What is read from a SavedModel is checked before TensorFlow loads it.

A SavedModel is a program. One that touches files or runs Python is refused, and so is one whose
files are not those that were exported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mdn.errors import RunError

# Of `mdn.json`: a reader of another one says so.
FORMAT = 2
DESCRIPTION = "mdn.json"

# Operations, by their names, that read or write files, run Python, reach other hosts, or end the
# process. No density needs one. The last lines: those whose names do not tell it.
_FORBIDDEN = re.compile(
    r"File|Filename|PyFunc|Dataset|Reader|Summary|Checkpoint|DataService|Bigtable|Lmdb|Rpc"
    r"|ImportEvent|LoadAndRemapMatrix|GenerateVocabRemapping|RemoteCall|TPU|Distributed"
    r"|XlaCustomCall|^Save|Restore|^Print|^Debug|^Dump|^Abort$|^_?Send|^_?Recv|^_?Host(Send|Recv)|^Collective"
    r"|^RecordInput|UnigramCandidateSampler|^Skipgram|^ImmutableConst|^(De|En)codeProto|^Copy"
    r"|CalibrationStatistics|IteratorFrom"
)
# How every SavedModel stores and finds its variables. The loader has code of its own for that,
# and calls none of them.
_SAVER = frozenset({"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"})


class Loaded(NamedTuple):
    """A SavedModel in memory.

    Attributes:
        model: as TensorFlow loads it.
        description: what `mdn.json` says.
        signature_def: name -> TensorFlow's own `SignatureDef`.
    """

    model: Any
    description: dict[str, Any]
    signature_def: Mapping[str, Any]


def load_saved_model(path: str | os.PathLike[str]) -> Loaded:
    """Return a SavedModel that `mdn` has written.

    Raises:
        RunError: it is none, is damaged, was written by another version, or could touch files.
    """
    description = read_description(path)
    signature_def = dict(check_graph(path).signature_def)
    import tensorflow as tf

    try:
        model = tf.saved_model.load(os.fspath(path))
    except Exception as error:  # of a damaged file TensorFlow raises almost anything
        raise _damaged(path, " ".join(str(error).split())[:200]) from error
    return Loaded(model, description, signature_def)


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `mdn.json` says of a SavedModel whose files are as they were written.

    Raises:
        RunError: there is none, it is of another version, or a file was changed since.
    """
    path = Path(path)
    for name in ("saved_model.pb", DESCRIPTION):
        if not (path / name).is_file():
            raise RunError(f"{path} is no SavedModel of mdn: it has no {name}; see mdn export")
    try:
        found = json.loads((path / DESCRIPTION).read_text("utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path / DESCRIPTION}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{DESCRIPTION} is no JSON") from error
    if not isinstance(found, dict):
        raise _damaged(path, f"{DESCRIPTION} is no object")
    if found.get("format") != FORMAT:
        raise RunError(
            f"{path} has format {found.get('format', 1)!r}, written by mdn "
            f"{found.get('mdn', '?')}; this version reads format {FORMAT}: export the run again, "
            "or take the version that wrote it"
        )
    _check_files(path, found)
    return found


def file_digests(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the SHA-256 of each file below a directory, by its path in there.

    Raises:
        RunError: a file cannot be read.
    """
    path = Path(path)
    try:
        return {
            file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.name != DESCRIPTION
        }
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def check_graph(path: str | os.PathLike[str]) -> Any:
    """Return the `MetaGraphDef` of a SavedModel, which neither touches files nor runs Python.

    Raises:
        RunError: it does, or it cannot be read.
    """
    from google.protobuf.message import DecodeError

    # As TensorFlow's own loader, which has no public name for it.
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString((Path(path) / "saved_model.pb").read_bytes())
        (graph,) = saved.meta_graphs
    except OSError as error:
        raise RunError(f"cannot read {path}/saved_model.pb: {error.strerror}") from error
    except (DecodeError, ValueError) as error:
        raise _damaged(path, "saved_model.pb is not one graph") from error
    exposed = set(graph.object_graph_def.concrete_functions)
    if not exposed:
        raise RunError(f"{path} holds no functions of TensorFlow 2: export the run again")
    if graph.asset_file_def:
        raise _refused(path, "it brings files of its own")
    bodies = {f.signature.name: f.node_def for f in graph.graph_def.library.function}
    asked = _reachable(exposed, bodies)
    for name, nodes in [("its graph", graph.graph_def.node), *bodies.items()]:
        allowed = frozenset() if name in asked else _SAVER
        for node in nodes:
            if node.op not in bodies and node.op not in allowed and _FORBIDDEN.search(node.op):
                raise _refused(path, f"the operation {node.op} in {name}")
    return graph


def _reachable(start: Iterable[str], bodies: dict[str, Any]) -> set[str]:
    """Return the functions that these call, and those that they call, and so on."""
    found: set[str] = set()
    ahead = [name for name in start if name in bodies]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += [callee for callee in _called(bodies[name]) if callee in bodies]
    return found


def _called(nodes: Any) -> Iterator[str]:
    for node in nodes:
        yield node.op
        for value in node.attr.values():
            yield value.func.name
            yield from (function.name for function in value.list.func)


def _check_files(path: Path, description: dict[str, Any]) -> None:
    """Compare the files with what was written; exports before that was kept have nothing."""
    expected = description.get("files")
    if expected is None:
        return
    found = file_digests(path)
    if not isinstance(expected, dict) or "saved_model.pb" not in expected:
        raise _damaged(path, f"{DESCRIPTION} does not list its files")
    for name, digest in expected.items():
        if name not in found:
            raise _damaged(path, f"{name} is not there")
        if found[name] != digest:
            raise _damaged(path, f"{name} is not as it was written")


def _damaged(path: str | os.PathLike[str], why: str) -> RunError:
    return RunError(f"{path} is damaged: {why}; export the run again")


def _refused(path: str | os.PathLike[str], what: str) -> RunError:
    return RunError(
        f"{path} is not loaded, as it could touch files or run code: {what}; load only what you "
        "have exported"
    )
