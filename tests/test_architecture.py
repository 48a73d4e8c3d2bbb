"""The arrows between the packages, by the imports that are written, and by those that happen."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "p2p", "petalctl", "petald")


def imports_of(package: str) -> Iterator[tuple[str, str]]:
    """Every import under a package: the file, and the whole name of what is imported."""
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"), name)):
            if isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} has a relative import"
                assert node.module is not None
                yield from ((name, f"{node.module}.{alias.name}") for alias in node.names)


def find_breaches(
    package: str, forbidden: tuple[str, ...], is_exempt: Callable[[str], bool] = lambda name: False
) -> list[str]:
    return [
        f"{name} imports {imported}"
        for name, imported in imports_of(package)
        if imported.split(".")[0] in forbidden and not is_exempt(name)
    ]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("kernels", ("trio", "libp2p", "multiaddr", "p2p", "petald", "petalctl")),
        ("p2p", ("torch", "numpy", "safetensors", "tokenizers", "kernels", "petald", "petalctl")),
        ("p2p/wire", ("trio", "libp2p", "torch", "numpy")),
        ("petalctl", ("petald", "libp2p", "multiaddr")),
        ("petald", ("libp2p", "multiaddr", "petalctl")),
    ],
)
def test_package_keeps_to_its_side(package, forbidden):
    assert find_breaches(package, forbidden) == []


def test_libp2p_is_imported_by_its_network_its_dialler_and_its_muxer_alone():
    def is_border(name: str) -> bool:
        return name in ("p2p/libp2p_network.py", "p2p/libp2p_dialler.py", "p2p/libp2p_muxer.py")

    for package in PACKAGES:
        assert find_breaches(package, ("libp2p",), is_border) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_something_to_check(package):
    assert len(list(imports_of(package))) > 20


def loaded_after(program: str) -> set[str]:
    """The top-level modules that are loaded once the program has run."""
    ended = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in ended.stdout.split()}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("petalctl.cli", {"torch", "numpy", "trio", "libp2p", "petald", "transformers"}),
        ("petalctl.client", {"torch", "numpy", "trio", "libp2p", "petald"}),
        ("petalctl.passes", {"torch", "numpy", "trio", "libp2p", "petald"}),
        ("petalctl.torch", {"trio", "libp2p", "petald", "transformers"}),
        ("petald.config", {"torch", "numpy", "trio", "libp2p", "multiaddr", "transformers"}),
        ("petald.log", {"torch", "trio", "libp2p"}),
        ("p2p.wire.message", {"torch", "numpy", "trio", "libp2p"}),
        ("kernels.model_store", {"torch", "trio", "libp2p"}),
    ],
)
def test_module_starts_quickly_for_want_of_heavy_imports(module, forbidden):
    assert loaded_after(f"import {module}") & forbidden == set()


def test_transformers_works_beside_our_kernels():
    """Hugging Face has a package of the import name ``kernels``, and looks for it."""
    program = (
        "import kernels\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,"
        " num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)\n"
        "LlamaForCausalLM(config)\n"
        "assert not hasattr(kernels, '__version__')\n"
    )
    assert "transformers" in loaded_after(program)
