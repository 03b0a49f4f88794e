"""Where the parameters of a model stand in the tensors of its files.

On loading, transformers renames the tensors of many models, stacks the experts' into one, splits, transposes and
permutes them. Its own conversion is asked here, not imitated: which tensors make up a parameter, and, with numbers in
the place of weights, where each of their elements goes. So whatever only moves elements can be merged, and nothing has
to be undone: an edit of a parameter is added in the files where the parameter's elements are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..errors import AdapterError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """The part of a matrix [O, I], a parameter or one expert of it, that a tensor of the files holds.

    Element (rows[i], columns[j]) of the matrix is element row_places[i] + column_places[j] of the flattened tensor.
    """

    rows: Tensor
    columns: Tensor
    row_places: Tensor
    column_places: Tensor

    def add(self, matrix: Tensor, tensor: Tensor) -> None:
        """Add this part of a matrix to a contiguous tensor of the files' shape, in place."""
        places = self.row_places[:, None] + self.column_places
        tensor.view(-1)[places] += matrix[self.rows[:, None], self.columns]


# The tensors that hold a matrix, each with its part of it; None for a tensor that is the whole parameter, unmoved.
StoredMatrix = list[tuple[str, Part | None]]


@dataclass(frozen=True)
class _Source:
    """The tensors of the files that become one parameter, or several at once.

    Attributes:
        name: the parameter, or the first of them.
        converter: what moves their elements; None if they are only renamed.
        tensors: (key, the converter's pattern that it matched), in the order of loading.
    """

    name: str
    converter: WeightConverter | None
    tensors: list[tuple[str, str | None]]

    def parameters(self) -> list[str]:
        if self.converter is None:
            return [self.name]
        first, *others = self.converter.target_patterns
        return [self.name, *(self.name.replace(first, other) for other in others)]

    def convert(self, values: Sequence[Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Parameter -> what it holds once these values stand in the tensors."""
        converter: Any = deepcopy(self.converter)
        for (key, pattern), value in zip(self.tensors, values, strict=True):
            converter.add_tensor(self.name, key, pattern, value)
        converted = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


class Conversion:
    """The way from the tensors of the files to the parameters of a model.

    Args:
        model: the model, without adapters; only the shapes of its parameters are read.
        shapes: key of each tensor of the files -> its shape.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, Shape]):
        self._model = model
        self._shapes = shapes
        self._parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._sources = {name: source for source in self._find_sources() for name in source.parameters()}
        self._known: dict[tuple, list[list[tuple[int, Part]]]] = {}

    def lacking(self) -> list[str]:
        """The model's parameters for which the files hold no tensor; of tied ones, one name is enough."""
        names: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return [tied[0] for tied in names.values() if not any(name in self._sources for name in tied)]

    def stored(self, parameter: str) -> list[StoredMatrix]:
        """The matrices of a parameter, one for each expert of a parameter [E, O, I].

        Raises:
            AdapterError: the files do not hold the parameter, or hold it in a way that cannot be followed.
        """
        if parameter not in self._sources:
            raise AdapterError(
                f"{parameter} is adapted, but the files hold no tensor of that name, nor tensors from which "
                f"transformers makes it (they hold {sorted(self._shapes)[:3]}, ...); expected the files of the base "
                "that the adapter was trained on"
            )
        source, shape = self._sources[parameter], self._parameters[parameter]
        keys = [key for key, _ in source.tensors]
        if source.converter is None:
            if self._shapes[keys[0]] != shape:
                raise _unclear(parameter, f"the tensor {keys[0]} {self._shapes[keys[0]]} is not of its shape {shape}")
            return [[(keys[0], None)]] * (shape[0] if len(shape) == 3 else 1)
        # Layers alike are converted alike, so that one of them is followed for all.
        patterns = tuple(pattern for _, pattern in source.tensors)
        place = source.parameters().index(parameter)
        likeness = (id(source.converter), patterns, tuple(self._shapes[key] for key in keys), place, shape)
        if likeness not in self._known:
            self._known[likeness] = self._follow(source, parameter)
        return [[(keys[index], part) for index, part in parts] for parts in self._known[likeness]]

    def _find_sources(self) -> list[_Source]:
        """As transformers' loader assigns them: all keys in one order, since a renaming may depend on earlier keys."""
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, known = self._model.base_model_prefix, self._model.state_dict()
        found: dict[str, _Source] = {}
        for key in sorted(self._shapes, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if name in known:
                converter = None if pattern is None else by_pattern[pattern]
                found.setdefault(name, _Source(name, converter, [])).tensors.append((key, pattern))
        return list(found.values())

    def _follow(self, source: _Source, parameter: str) -> list[list[tuple[int, Part]]]:
        """For each matrix of the parameter, which tensors of the source hold which part of it."""
        shapes = [self._shapes[key] for key, _ in source.tensors]
        sizes = [int(torch.Size(shape).numel()) for shape in shapes]
        numbers = torch.arange(max(sizes), dtype=torch.int32 if max(sizes) < 2**31 else torch.int64)
        # Expanded, and views of one range: the tensors take no memory of their own.
        origins = [torch.tensor(index, dtype=torch.int16).expand(shape) for index, shape in enumerate(shapes)]
        places = [numbers[:size].view(shape) for size, shape in zip(sizes, shapes, strict=True)]
        try:
            origin, place = (source.convert(values, self._model)[parameter] for values in (origins, places))
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
            raise _unclear(parameter, f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        expected = self._parameters[parameter]
        if tuple(origin.shape) != expected or tuple(place.shape) != expected:
            raise _unclear(parameter, f"{len(shapes)} tensors make it {tuple(place.shape)}, expected {expected}")
        if (origin.dtype, place.dtype) != (torch.int16, numbers.dtype):
            raise _unclear(parameter, "the conversion computes with the weights")
        starts = torch.tensor([0, *accumulate(sizes)])
        seen = torch.zeros(sum(sizes), dtype=torch.bool)
        matrices = zip(origin, place, strict=True) if origin.dim() == 3 else [(origin, place)]
        followed = [_parts(parameter, *matrix, starts, seen) for matrix in matrices]
        if int(torch.count_nonzero(seen)) != origin.numel():  # a sum would copy it as int64
            raise _unclear(parameter, "several of its elements come from the same one")
        return followed


def _parts(parameter: str, origin: Tensor, place: Tensor, starts: Tensor, seen: Tensor) -> list[tuple[int, Part]]:
    """The parts of a matrix, from the tensor that each element comes from and its place there.

    Args:
        parameter: its name.
        origin: [O, I], index of the tensor.
        place: [O, I], place in that tensor, flattened.
        starts: places before each tensor, if all stood in a row.
        seen: for each of these places, whether it was met; those of the matrix are marked.
    """
    indices = torch.cat([origin[0], origin[:, 0]]).unique().tolist()
    parts, covered = [], 0
    for index in indices:
        if not 0 <= index < len(starts) - 1:
            raise _unclear(parameter, "the conversion computes with the weights")
        held = origin == index
        rows, columns = held.any(1).nonzero().squeeze(1), held.any(0).nonzero().squeeze(1)
        places = place[rows[:, None], columns].long()
        part = Part(rows, columns, places[:, 0], places[0] - places[0, 0])
        inside = bool((places >= 0).all()) and bool((places < starts[index + 1] - starts[index]).all())
        regular = torch.equal(places, part.row_places[:, None] + part.column_places)
        if not (inside and regular and bool(held[rows[:, None], columns].all())):
            raise _unclear(parameter, "its elements are not moved by whole rows and columns")
        seen[starts[index] + places] = True
        parts.append((index, part))
        covered += places.numel()
    if covered != origin.numel():
        raise _unclear(parameter, "its elements are not moved by whole rows and columns")
    return parts


def _unclear(parameter: str, reason: str) -> AdapterError:
    return AdapterError(
        f"{parameter} is adapted, but how transformers makes it of the tensors in the files cannot be followed "
        f"({reason}); load the model in full precision and use PEFT's merge_and_unload, or leave the layer out"
    )
