"""The house rules: which room may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "longer"
FORBIDDEN = {
    "model": (
        "ray",
        "longer.data",
        "longer.training",
        "longer.serving",
        "longer.files",
        "longer.storage",
        "jobs",
        "serve_apps",
    ),
    "data": ("torch", "longer.model", "longer.training", "longer.serving", "jobs", "serve_apps"),
    "training": ("longer.serving", "jobs", "serve_apps", "fastapi"),
    "serving": ("jobs", "serve_apps", "fastapi", "ray.serve"),
}
RAY_STANDS_AT_THE_EDGE = "ray_"


def imports_of(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def offenders(files: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports_of(file)
        if any(name == f or name.startswith(f + ".") for f in forbidden)
    ]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_room_imports_a_room_above_it(room: str) -> None:
    assert offenders(list((PACKAGE / room).glob("*.py")), FORBIDDEN[room]) == []


def test_data_kernels_import_no_ray() -> None:
    kernels = [file for file in (PACKAGE / "data").glob("*.py") if not file.name.startswith(RAY_STANDS_AT_THE_EDGE)]
    assert offenders(kernels, ("ray",)) == []


def test_the_cache_and_its_policy_import_no_torch() -> None:
    assert offenders([PACKAGE / "serving" / "cache.py"], ("torch", "ray")) == []


def test_the_autoscaling_policy_imports_nothing_that_the_controller_lacks() -> None:
    assert offenders([ROOT / "platform" / "longer" / "autoscaling.py"], ("longer", "serve_apps", "torch")) == []


def test_platform_is_a_folder_not_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
