"""Which classes and functions a run may name, in its config or in its model.

To import a module is to run it, and a function that is called runs too. What a foreign run names
is therefore looked up beforehand: what is of this package, a part of Keras that does no more than
compute, or registered with Keras in this process already, is let through; of all else nothing is
imported, unless its user says by name that it may be.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mdn.errors import ConfigError, MDNError, RunError
from mdn.options import OPTIONS

# Of Keras: where the classes of its public interface say that they are from, and how the rest of a
# model that is a graph of layers does.
_PUBLIC = re.compile(
    r"(tf_)?keras(\.(layers|models|optimizers(\.(schedules|legacy|experimental))?|initializers"
    r"|regularizers|constraints|losses|metrics|activations|mixed_precision))?"
)
_GRAPH = re.compile(
    r"(tf_)?keras\.src\.(engine\.(functional|sequential|training)|layers\.core\.tf_op_layer)"
)
_GRAPH_CLASSES = ("Functional", "Sequential", "Model", "TFOpLambda", "SlicingOpLambda")
# Layers that call a function by its name, and those functions that compute, and do nothing else.
_CALLING = ("TFOpLambda", "SlicingOpLambda")
_COMPUTING = re.compile(
    r"(math|nn|linalg|signal|__operators__)\.\w+|abs|add_n|argmax|argmin|argsort|broadcast_to|cast"
    r"|clip_by_value|concat|cumsum|einsum|exp|expand_dims|eye|fill|floor|gather|gather_nd|identity"
    r"|linspace|matmul|maximum|minimum|norm|one_hot|ones|ones_like|pad|pow|range|reduce_\w+|repeat"
    r"|reshape|reverse|round|shape|sigmoid|sign|sin|cos|tan|tanh|slice|sort|split|sqrt|square"
    r"|squeeze|stack|stop_gradient|strided_slice|tile|transpose|unstack|where|zeros|zeros_like"
)
# Layers that run functions, load other models, or read files.
_REFUSED = ("Lambda", "TFSMLayer", "StringLookup", "IntegerLookup", "TextVectorization")
_VALUES = ("__tensor__", "__numpy__", "__bytes__")
_FUNCTIONS = ("activations", "losses", "metrics", "initializers", "regularizers", "constraints")


def import_trusted(trust: Sequence[str]) -> None:
    """Import the modules of classes, which registers them with Keras.

    Args:
        trust: "module.Class" each.

    Raises:
        ConfigError: there is no such class.
    """
    for name in trust:
        module, _, attribute = name.rpartition(".")
        if not module:
            raise ConfigError(f"trust={name}: give the module too, such as mine.{name}")
        try:
            getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"trust={name}: {' '.join(str(error).split())}") from error


def check_constructors(config: DictConfig, key: str, trust: Sequence[str] = ()) -> None:
    """Check what a part of a run's config would call, and what that is given.

    Args:
        config: of a run, perhaps of another's.
        key: of the part.
        trust: "module.Class" each, which may be called.

    Raises:
        RunError: it is no constructor of this package's configs, nor one of `trust`.
    """
    node = OmegaConf.select(config, key)
    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    known = {name for name in OPTIONS if name.startswith("mdn.")} | set(trust)
    if foreign := sorted(set(map(str, _targets(values))) - known):
        raise _refusal(f"{key}._target_ of the run's config", foreign)


def _targets(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        if "_target_" in values:
            yield values["_target_"]
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _targets(value)


def check_model(
    path: str | os.PathLike[str], trust: Sequence[str] = (), compile: bool = True
) -> None:
    """Check what a `.keras` file names, before Keras imports it.

    Args:
        path: of the file.
        trust: "module.Class" each, which may be loaded.
        compile: whether the optimizer and the loss are to be loaded too.

    Raises:
        RunError: it names what is neither of this package nor a harmless part of Keras, nor
            registered, nor one of `trust`.
        Exception: whatever is raised where it is no such file.
    """
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    if not compile and isinstance(config, dict):
        config.pop("compile_config", None)
    if foreign := sorted(set(_foreign(config)) - set(trust)):
        raise _refusal(str(path), foreign)


def _refusal(where: str, names: list[str]) -> MDNError:
    shown = ["".join(c if c.isprintable() else "?" for c in name[:100]) for name in names[:5]]
    return RunError(
        f"{where} names {', '.join(shown)}, which is neither of mdn nor a harmless part of Keras, "
        "and to load it is to run it: if you know its code, allow it by name, with "
        f"{' '.join(f'--trust {name}' for name in shown)} or, in Python, trust={shown}"
    )


def _foreign(node: Any) -> Iterator[str]:
    """Yield the names, "module.Class", of all that may not be loaded."""
    if isinstance(node, dict):
        if "class_name" in node and not _is_known(node):
            name = node.get("config") if node["class_name"] == "function" else node["class_name"]
            yield f"{node.get('module')}.{name}"
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from _foreign(value)


def _is_known(node: dict[str, Any]) -> bool:
    """Return whether Keras finds what a node names without importing anything but its own."""
    name, module = node["class_name"], node.get("module")
    if name == "function":
        return _is_function(node.get("config"), module)
    registered = node.get("registered_name", name)
    if not all(isinstance(word, str) for word in (name, module or "", registered or "")):
        return False
    if name in _VALUES:
        return True
    if name in _REFUSED or name == "__typespec__":
        return False
    if _registered(registered):
        return True
    if not module:
        return True  # nor does Keras look for it anywhere
    if module.startswith("mdn."):
        return _is_class(name, module)
    if _GRAPH.fullmatch(module):
        called = node.get("config")
        function = called.get("function") if isinstance(called, dict) else None
        return name in _GRAPH_CLASSES and (
            name not in _CALLING or re.fullmatch(_COMPUTING, str(function)) is not None
        )
    return _is_plain(name) and _PUBLIC.fullmatch(module) is not None


def _is_function(name: Any, module: Any) -> bool:
    import tf_keras

    if not isinstance(name, str) or not isinstance(module or "", str):
        return False
    if _registered(name):
        return True
    if module not in (None, "builtins") and _PUBLIC.fullmatch(module) is None:
        return False
    homes = [getattr(tf_keras, home) for home in _FUNCTIONS]
    return _is_plain(name) and any(hasattr(home, name) for home in homes)


def _is_plain(name: str) -> bool:
    """Return whether this is the name of something public, not a path to it."""
    return name.isidentifier() and not name.startswith("_")


def _registered(name: str | None) -> bool:
    import tf_keras

    return name is not None and tf_keras.saving.get_registered_object(name) is not None


def _is_class(name: str, module: str) -> bool:
    """Return whether a module of this package has such a class of its own."""
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return False
    return isinstance(found, type) and found.__module__.startswith("mdn.")
