"""What the documents say can be run is run, and what they name is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from unittest import mock

import pytest
from conftest import ROOT, TINY

import evaluate
import inference
import train

DOCUMENTS = {str(path.relative_to(ROOT)): re.sub(r"\\\n +", "", path.read_text())  # a command on two lines is one
             for pattern in ("*.md", "[a-z]*/*.md") for path in ROOT.glob(pattern)}
INDENTED = [part.split(" #")[0] for line in re.findall(r"^    (\S.*)$", DOCUMENTS["README.md"], flags=re.MULTILINE)
            for part in line.split(" && ")]
COMMANDS = sorted({command for command in INDENTED if re.match(r"(\w+=\S+ )*(python|torchrun) ", command)})
CALL = re.compile(r"(?:python|torchrun)(?: [^`\n]*)? (train|inference|evaluate)\.py\b([^`#&\n]*)")
CALLS = sorted({call for name, text in DOCUMENTS.items() if not name.startswith("experiments/")  # its log has old options
                for call in CALL.findall(text)})
EXAMPLES = re.findall(r"```python\n((?:from|import) .*?)```", DOCUMENTS["docs/faq.md"], flags=re.DOTALL)
SHORTER = {  # options that make a command short; the last one counts
    "train.py": [*map(str, TINY), "--epochs", "1"],
    "inference.py": ["--steps", "2"],
    "evaluate.py": ["--n", "100", "--steps", "2"],
}
WORK = {"train": (train, "train"), "inference": (inference, "sample_pictures"), "evaluate": (evaluate, "measure")}


def anchors(document: str) -> set[str]:
    """The places of a document that a link can lead to, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", document, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_lead_somewhere(name):
    for place in re.findall(r"\]\((?!https?:)([^)]+)\)|src=\"(?!https?:)([^\"]+)\"", DOCUMENTS[name]):
        path, _, anchor = "".join(place).partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), place
        assert not anchor or anchor in anchors(target.read_text()), place


def test_every_symbol_of_the_paper_map_exists():
    without_links = re.sub(r"\[.*?\]\(.*?\)", "", DOCUMENTS["docs/paper-map.md"])
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", without_links)
    assert "diffusion.GaussianDiffusion.q_sample" in names
    for name in names:
        resolve_name(name)


def test_the_code_in_readme_is_the_projects():
    """The lines of a block stand in one file, in this order."""
    files = [[line.strip() for line in path.read_text().splitlines()] for path in ROOT.glob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENTS["README.md"], flags=re.DOTALL)
    assert blocks
    for block in blocks:
        wanted = [line.strip() for line in block.splitlines()]
        rests = map(iter, files)
        assert any(all(line in rest for line in wanted) for rest in rests), block


@pytest.mark.parametrize(("script", "options"), CALLS)
def test_every_call_of_a_script_is_accepted(script, options, call, monkeypatch, tmp_path):
    """In code blocks and within sentences; the work itself is left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").mkdir()
    module, work = WORK[script]
    with mock.patch.object(module, work):
        status, _, err = call(module.main, *options.split())
    assert status == 0, err


@pytest.fixture(scope="module")
def copy_of_the_project(tmp_path_factory):
    """Without its git."""
    folder = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), ROOT / "model.pth"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "runtime", folder / "runtime")
    (folder / "assets").mkdir()
    (folder / "mnist").symlink_to(ROOT / "mnist")
    return folder


def run(command: str, folder: Path) -> None:
    ended = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=300,
                           env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "pytest" not in c])
def test_every_command_of_readme_runs(command, copy_of_the_project):
    shorter = " ".join([command, *(option for words in SHORTER if words in command for option in SHORTER[words])])
    if " --resume" in shorter:
        run(shorter.replace(" --resume", ""), copy_of_the_project)
    run(shorter, copy_of_the_project)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_every_python_example_runs(example, copy_of_the_project):
    (copy_of_the_project / "example.py").write_text(example)
    run("python example.py", copy_of_the_project)
