from __future__ import annotations

import json
import pickle
import struct
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxpath.errors import ModelError
from fxpath.weights import fit_state_dict, read_arrays, read_state_dict


def small(seed: int = 0, *, outputs: int = 2) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, outputs)))


def saved(tmp_path: Path, content: object, name: str = "weights.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "loss": 0.5},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
    ],
)
def test_checkpoints_of_every_usual_form_load(tmp_path: Path, wrap: Callable[[dict[str, Any]], object]) -> None:
    source, target = small(1), small(2)
    assert not same(source, target)
    file = saved(tmp_path, wrap(source.state_dict()))
    fit_state_dict(target, read_state_dict(file), name="small", file=file)
    assert same(source, target)


def test_only_a_prefix_of_all_names_is_taken_off(tmp_path: Path) -> None:
    file = saved(tmp_path, {"module.a": torch.zeros(1), "b": torch.ones(1)})
    assert list(read_state_dict(file)) == ["module.a", "b"]


def test_misfit_is_counted_and_named_and_changes_nothing(tmp_path: Path) -> None:
    model = small(0, outputs=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = small(1, outputs=3).state_dict()
    del state["conv.bias"]
    state |= {f"head.{number}": torch.zeros(1) for number in range(5)}
    with pytest.raises(ModelError) as raised:
        fit_state_dict(model, state, name="my:model", file="w.pth")
    said = str(raised.value)
    assert said.startswith("my:model: the weights in w.pth do not fit: 1 missing (conv.bias), ")
    assert "5 unexpected (head.0; head.1; head.2; …)" in said
    assert "2 of another shape (fc.weight: expected (2, 4), found (3, 4); fc.bias: expected (2,), found (3,))" in said
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.pth: expected a .* file, found no such file"):
        read_state_dict(tmp_path / "absent.pth")
    with pytest.raises(ModelError, match="found a folder"):
        read_state_dict(tmp_path)
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint at all")
    with pytest.raises(ModelError, match=r"noise\.pth: torch\.load\(weights_only=True\) cannot read it"):
        read_state_dict(tmp_path / "noise.pth")
    whole = saved(tmp_path, small().state_dict()).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"cut\.pth"):
        read_state_dict(tmp_path / "cut.pth")
    with pytest.raises(ModelError, match=r"expected a state dict .* found a list"):
        read_state_dict(saved(tmp_path, [torch.zeros(1)]))
    with pytest.raises(ModelError, match="found an empty dict"):
        read_state_dict(saved(tmp_path, {}))
    with pytest.raises(ModelError, match="expected names to tensors, found 'epoch': int"):
        read_state_dict(saved(tmp_path, {"a": torch.zeros(1), "epoch": 3}))


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weights_only=True\) cannot read it .* save torch\.save"):
        read_state_dict(saved(tmp_path, small()))


def write_safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    """The format as published: length of the header, header in JSON, then the bytes of all tensors."""
    header: dict[str, Any] = {}
    data = b""
    for name, value in state.items():
        raw = value.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_float32(path: Path, device: str) -> dict[str, torch.Tensor]:
    """Stands in for safetensors.torch.load_file where the package is not installed."""
    assert device == "cpu"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    return {
        name: torch.frombuffer(bytearray(data[slice(*entry["data_offsets"])]), dtype=torch.float32).view(entry["shape"])
        for name, entry in header.items()
    }


@pytest.fixture
def safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("safetensors.torch")
        stand_in.load_file = read_float32  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
        monkeypatch.setitem(sys.modules, "safetensors.torch", stand_in)


@pytest.mark.usefixtures("safetensors")
def test_safetensors_load(tmp_path: Path) -> None:
    source, target, file = nn.Linear(3, 2), nn.Linear(3, 2), tmp_path / "w.safetensors"
    write_safetensors(file, source.state_dict())
    fit_state_dict(target, read_state_dict(file), name="linear", file=file)
    assert same(source, target)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ModelError, match=r"w\.safetensors: not a whole safetensors file"):
        read_state_dict(file)


def test_missing_safetensors_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(ModelError, match=r"pip install safetensors, or give a \.pth file"):
        read_state_dict(tmp_path / "w.safetensors")


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("place", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_pickled_arrays_are_read(tmp_path: Path, protocol: int, place: bytes) -> None:
    arrays = {"conv": [np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.ones(4, dtype=np.float64)]}
    raw = pickle.dumps(arrays, protocol=protocol)
    if protocol == 3:  # in protocol 4 names carry their length
        raw = raw.replace(b"numpy._core.multiarray", place)
    (tmp_path / "a.pkl").write_bytes(raw)
    read = read_arrays(tmp_path / "a.pkl")
    assert [value.dtype for value in read["conv"]] == [np.float32, np.float64]
    assert all(np.array_equal(one, two) for one, two in zip(read["conv"], arrays["conv"], strict=True))


class Calls:
    """Pickles as a call of `function` on `arguments`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def touch(path: str) -> None:
    Path(path).touch()


def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    import os

    mark = tmp_path / "was_here"
    attacks = [
        Calls(os.system, f"touch {mark}"),
        Calls(eval, f"open({str(mark)!r}, 'w').close()"),
        Calls(exec, f"open({str(mark)!r}, 'w').close()"),
        Calls(touch, str(mark)),
        Calls(getattr, str(mark), "upper"),
        Calls(np.save, str(mark), np.zeros(1)),
    ]
    for attack in attacks:
        payload = {"conv1": [np.zeros(2, dtype=np.float32), attack]}
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(payload, protocol=4))
        with pytest.raises(ModelError, match=r"bad\.pkl: refused .* it asks for \S+, which no array needs"):
            read_arrays(tmp_path / "bad.pkl")
        assert not list(tmp_path.glob("was_here*"))


def test_a_pickle_cannot_ask_for_memory(tmp_path: Path) -> None:
    reconstruct = np.zeros(1).__reduce__()[0]
    attacks = {
        "before its data": Calls(reconstruct, np.ndarray, (2**50,), b"b"),
        "not callable": Calls(np.ndarray, (2**50,)),
    }
    for said, attack in attacks.items():
        (tmp_path / "huge.pkl").write_bytes(pickle.dumps(attack, protocol=4))
        with pytest.raises(ModelError, match=said):
            read_arrays(tmp_path / "huge.pkl")


def test_damaged_and_absent_pickles_are_named(tmp_path: Path) -> None:
    raw = pickle.dumps({"a": [np.arange(1000.0)]}, protocol=3)
    for length in (0, 1, len(raw) // 2, len(raw) - 1):
        (tmp_path / "cut.pkl").write_bytes(raw[:length])
        with pytest.raises(ModelError, match=r"cut\.pkl: refused as a pickle of arrays"):
            read_arrays(tmp_path / "cut.pkl")
    with pytest.raises(ModelError, match=r"absent\.pkl"):
        read_arrays(tmp_path / "absent.pkl")
