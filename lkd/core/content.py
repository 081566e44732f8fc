"""What a caller's object is made of, as a tree to be hashed: tensors, numbers, words and code; of the rest the type."""

import dis
from collections.abc import Iterable
from functools import partial
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

OWN = vars(nn.Module()).keys()  # what every module holds


def describe_content(value: Any, weights: bool = True) -> Any:
    """A tree that is another where an object would compute something else, as far as that can be seen.

    Of a function: its code, and what it refers to; of a bound method and of an object with a call also what the object
    holds; of a network: tensors, and what its modules hold beside them. Code of a class is not looked at, nor what lies
    in another Python module than what refers to it.

    Args:
        value: The object.
        weights: Whether tensors count; else their shapes alone do.
    """
    return Description(weights).of(value, getattr(value, "__module__", ""))


class Description:
    """Describes objects, each once; see `describe_content`."""

    def __init__(self, weights: bool) -> None:
        self.weights = weights
        self.seen: dict[int, int] = {}
        self.alive: list[Any] = []  # so that no other object gets the id of one that was seen

    def of(self, value: Any, module: str) -> Any:
        """The tree of a value that something in this Python module refers to."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.dtype | torch.device | PurePath | bytes | complex):
            return str(value)
        if isinstance(value, Tensor):
            return None if is_lazy(value) else value if self.weights else list(value.shape)
        if isinstance(value, np.ndarray | np.generic):
            return self.of(value.tolist(), module)
        if isinstance(value, tuple):  # which Python shares as it likes
            return self.each(value, module)
        if isinstance(value, CodeType):
            return [value.co_code.hex(), list(value.co_names), self.each(value.co_consts, module)]
        if isinstance(value, set | frozenset):
            return sorted(str(each) for each in value if isinstance(each, int | float | str))
        if isinstance(value, MethodType):
            return [self.of_owned(value.__func__), self.of(value.__self__, type(value.__self__).__module__)]
        if id(value) in self.seen:
            return ["again", self.seen[id(value)]]
        self.seen[id(value)] = len(self.seen)
        self.alive.append(value)
        if isinstance(value, dict):
            return self.each(value.items(), module)
        if isinstance(value, list):
            return self.each(value, module)
        if isinstance(value, partial):
            return [self.of_owned(value.func), self.each(value.args, module), self.of(value.keywords, module)]
        if isinstance(value, nn.Module):
            return self.of_network(value)
        if isinstance(value, FunctionType) and value.__module__ == module:
            return self.of_function(value)
        kind: Any = value if hasattr(value, "__qualname__") else type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return [name, *self.of_object(value)] if kind is not value and kind.__module__ == module else name

    def of_owned(self, value: Any) -> Any:
        """The tree of a function wherever it comes from."""
        return self.of(value, value.__module__)

    def each(self, values: Iterable[Any], module: str) -> list[Any]:
        return [self.of(value, module) for value in values]

    def of_function(self, function: FunctionType) -> list[Any]:
        """Its code, defaults, and what it refers to of the function and the module around it."""
        module = function.__module__
        codes = [function.__code__]
        for code in codes:  # with those of lambdas and comprehensions in it
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        steps = [each for code in codes for each in dis.get_instructions(code)]
        named = sorted({each.argval for each in steps if each.opname == "LOAD_GLOBAL"})
        read = [function.__globals__.get(name) for name in named]
        cells = [read_cell(cell) for cell in function.__closure__ or ()]
        options = sorted((function.__kwdefaults__ or {}).items())
        return [
            self.of(function.__code__, module),
            *(self.each(values, module) for values in (function.__defaults__ or (), options, cells, read)),
        ]

    def of_object(self, value: Any) -> list[Any]:
        """What an object holds, and the code of its call, if it has one."""
        call = vars(type(value)).get("__call__")
        held = sorted(getattr(value, "__dict__", {}).items())
        return [self.of(call, type(value).__module__), *(self.each(item, type(value).__module__) for item in held)]

    def of_network(self, network: nn.Module) -> list[Any]:
        """Its modules: of each the type, and all that it holds itself."""
        rows = []
        for name, module in network.named_modules():
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            held = sorted((key, value) for key, value in vars(module).items() if key not in OWN)
            kind = type(module)
            rows.append([name, kind.__qualname__, *(self.each(item, kind.__module__) for item in [*tensors, *held])])
        return rows


def read_cell(cell: Any) -> Any:
    """What a function refers to of the function around it; None if that has not said yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
