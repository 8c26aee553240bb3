"""What the documents say can be run is run, and what they name is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
from conftest import ROOT, TINY

DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text()
             for pattern in ("*.md", "[a-z]*/*.md") for path in ROOT.glob(pattern)}
README = DOCUMENTS["README.md"]
COMMANDS = sorted({
    command.split(" #")[0].strip() for line in re.findall(r"^    (\S.*)$", README, re.MULTILINE)
    for command in line.split(" && ") if command.startswith(("python ", "torchrun "))})
EXAMPLES = re.findall(r"```python\n((?:from|import) .*?)```", DOCUMENTS["docs/faq.md"], re.DOTALL)
SHORTER = {  # options that make a command short; the last one counts
    "train.py": [*map(str, TINY), "--epochs", "1"],
    "inference.py": ["--steps", "2"],
    "evaluate.py": ["--n", "100", "--steps", "2"],
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_lead_somewhere(name):
    pattern = r"\]\((?!https?:)([^)]+)\)|src=\"(?!https?:)([^\"]+)\""
    for place in re.findall(pattern, DOCUMENTS[name]):
        path = "".join(place).partition("#")[0]
        assert ((ROOT / name).parent / path).exists(), place


def test_every_symbol_of_the_paper_map_exists():
    without_links = re.sub(r"\[.*?\]\(.*?\)", "", DOCUMENTS["docs/paper-map.md"])
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", without_links)
    assert "diffusion.GaussianDiffusion.q_sample" in names
    for name in names:
        resolve_name(name)


def test_the_code_in_readme_is_the_projects():
    """The lines of a block stand in one file, in this order."""
    files = [[line.strip() for line in path.read_text().splitlines()] for path in ROOT.glob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        wanted = [line.strip() for line in block.splitlines()]
        rests = map(iter, files)
        assert any(all(line in rest for line in wanted) for rest in rests), block


@pytest.fixture(scope="module")
def copy_of_the_project(tmp_path_factory):
    """Without its git."""
    folder = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), ROOT / "model.pth"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "runtime", folder / "runtime")
    (folder / "mnist").symlink_to(ROOT / "mnist")
    return folder


def run(command: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True,
                           timeout=300, env={**os.environ, "PATH": path})
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "pytest" not in c])
def test_every_command_of_readme_runs(command, copy_of_the_project):
    options = [option for name in SHORTER if name in command for option in SHORTER[name]]
    shorter = " ".join([command, *options])
    if " --resume" in shorter:
        run(shorter.replace(" --resume", ""), copy_of_the_project)
    run(shorter, copy_of_the_project)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_every_python_example_runs(example, copy_of_the_project):
    (copy_of_the_project / "example.py").write_text(example)
    run("python example.py", copy_of_the_project)
