"""The matrix of releases, without installing any."""

import re
import subprocess
import sys

import pytest
import torch

from tests import versions


def packages(text: str) -> list[str]:
    return [line.partition("==")[0] for line in text.splitlines()]


def test_a_release_takes_the_place_of_the_same_packages():
    pinned = versions.PINNED.read_text(encoding="utf-8")
    made = versions.constraints("2.11")
    wanted = ["torch==2.11.0", "triton==3.6.0"]
    assert [line for line in made.splitlines() if re.match(r"(torch|triton)=", line)] == wanted
    assert packages(made).count("numpy") == 2 and "numpy==2.3.5" in made
    assert set(packages(made)) == {name for name in packages(pinned) if name and "#" not in name}
    assert re.search(r"^torchvision==", made, re.MULTILINE)  # another package, whose name begins alike


def test_the_makefile_names_releases_that_there_are():
    found = re.search(r"^RELEASES \?= (.*)$", (versions.ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    files = {path.stem.partition("-")[2] for path in versions.file_of("2.11").parent.glob("*.txt")}
    assert set(found[1].split()) == files | {versions.pinned_release()}


def test_an_unknown_release_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as error:
        versions.main(["1.0"])
    assert error.value.code == 2 and "tests/constraints/torch-1.0.txt" in capsys.readouterr().err


def test_no_release_is_nothing_to_do(capsys):
    assert versions.main([]) == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize("code", [0, 3])
def test_a_step_that_fails_is_shown_and_exit_code_1(code, capsys, monkeypatch):
    steps = {"one": ("-c", f"print('last words'); raise SystemExit({code})"), "two": ("-c", "print('fine')")}
    monkeypatch.setattr(versions, "STEPS", steps)
    release = ".".join(torch.__version__.split(".")[:2])
    monkeypatch.setattr(versions, "pinned_release", lambda: release)
    assert versions.main([release]) == int(code > 0)
    lines = capsys.readouterr().out.splitlines()
    one, two = lines[-2:]
    assert one.endswith("last words") and ("FAILED" in one) == (code > 0)
    assert two.endswith("fine") and "passed" in two
    assert (f"^ torch {release}: one, exit code 3" in lines) == (code > 0)


def test_another_release_than_asked_for_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"torch 2\.1 was asked for"):
        versions.test("2.1", sys.executable, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("missing", "code"), [("diffusers", 0), ("PIL", 1)])
def test_only_what_is_optional_may_be_missing_when_all_is_imported(missing, code):
    program = f"import sys; sys.modules[{missing!r}] = None\n{versions.IMPORTS}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    if code == 0:
        assert " soflow_fast.pipeline without diffusers" in run.stdout
    else:
        assert missing in run.stderr.splitlines()[-1]
