"""Which sources decide what a module does."""

from __future__ import annotations

from pathlib import Path

from megatron_completedp.study.code import imported, sources_hash


def test_a_module_is_made_of_all_that_it_imports(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    (package / "sub").mkdir(parents=True)
    files = {
        "a": "import os\nfrom pkg.b import thing\n",
        "b": "def f():\n    from pkg.sub import c\n",
        "sub/c": "from pkg.a import more\nfrom other.x import y\n",
        "d": "from pkg.a import more\n",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    # A neighbour in site-packages, where a package is installed.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.py").write_text("")
    found = {path.relative_to(package).as_posix() for path in imported(package, "pkg.a")}
    assert found == {"a.py", "b.py", "sub/c.py"}


def test_a_simulated_curve_depends_on_its_samplers_and_not_on_the_workers() -> None:
    package = Path(__file__).parents[2] / "megatron_completedp"
    found = {path.name for path in imported(package, "megatron_completedp.search.simulate")}
    assert {"samplers.py", "trust_region.py", "linear_model.py", "turbo.py"} <= found
    assert not {"worker.py", "queue.py", "loop.py"} & found
    assert sources_hash("megatron_completedp.search.simulate") != sources_hash()
