"""Tab completion: what bash offers, asked of the script as bash asks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmerge.cli import main

pytest.importorskip("shtab")
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script, beside a folder and a file that can be named."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "photos").mkdir()
    (folder / "merge.json").write_text("{}")
    command = [sys.executable, "-m", "tokenmerge.cli", "--print-completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (folder / "tokenmerge.bash").write_text(done.stdout)
    return folder / "tokenmerge.bash"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("be", ["bench"]),
        ("--ver", ["--version"]),
        ("bench --quie", ["--quiet"]),
        ("bench vit_small_patch16_22", ["vit_small_patch16_224"]),
        ("doctor refer", ["reference"]),
        ("bench pho", ["photos"]),
        ("eval reference --data pho", ["photos"]),
        ("eval reference --method tof", ["tofu"]),
        ("eval reference --method mer", ["merge.json"]),
        ("compare reference --methods tome tof", ["tofu"]),
        ("export reference --restore de", ["dense"]),
        ("train fine", ["finetune"]),
    ],
)
def test_bash_offers(script: Path, line: str, offered: list[str]) -> None:
    words = " ".join(f"'{word}'" for word in ("tokenmerge", *line.split()))
    ask = f"source {script}; COMP_WORDS=({words}); COMP_CWORD=$(({len(line.split())})); _shtab_tokenmerge; "
    done = subprocess.run(
        ["bash", "-c", ask + 'printf "%s\\n" "${COMPREPLY[@]}"'], cwd=script.parent, capture_output=True, text=True
    )
    assert (done.stdout.split(), done.stderr) == (offered, "")


def test_a_shell_without_completion_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "cmd"]) == 2
    assert "no shell with completion 'cmd'" in capsys.readouterr().err


def test_the_script_for_zsh(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--print-completion", "zsh"])
    out = capsys.readouterr().out
    assert raised.value.code == 0 and out.startswith("#compdef tokenmerge") and "compadd -- " in out


def test_without_shtab_its_install_command_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err == "tokenmerge: tab completion needs shtab: pip install shtab\n"
