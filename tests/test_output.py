"""Directories are replaced atomically: after a kill or a full disk there is the old one or the new one."""

import argparse
import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys

import builders
import pytest
from peft import PeftModel

from peft_perta import OutputError, load_provenance, save_perta_adapter
from peft_perta.cli._output import check_output_of
from peft_perta.data import (
    check_file,
    check_output,
    claimed_directory,
    remove_directory,
    replaced_directory,
    write_file,
)
from peft_perta.model import hash_file

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "perta_provenance.json"]


@pytest.fixture(scope="module")
def old_and_new():
    """Two emitted adapters, told apart by their strength."""
    model = builders.with_adapters(builders.llama(), builders.lora_config(["q_proj"]))
    return [builders.negate(model, weighting="uniform", strength=strength) for strength in (1.0, 2.0)]


def strength_of(path):
    """The strength in a directory; fails if the directory is incomplete or mixes old and new files."""
    assert sorted(os.listdir(path)) == FILES
    provenance, hashes = load_provenance(path)
    assert {name: hash_file(path / name) for name in hashes} == hashes
    return provenance.config["strength"]


def killed_at(event_number, save) -> bool:
    """Run ``save`` in a child that kills itself at its n-th system call. False if the child finished before."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event, arguments):
            nonlocal seen
            if event.startswith(("open", "os.", "shutil.", "tempfile.", "ctypes.")):
                seen += 1
                if seen == event_number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            save()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("first", [True, False], ids=["new directory", "old directory"])
def test_a_kill_at_any_point_leaves_the_old_or_the_new(first, old_and_new, tmp_path):
    old, new = old_and_new
    path = tmp_path / "out"
    strengths = []
    for event_number in range(1, 1000):
        if not first:
            save_perta_adapter(path, *old)
        alive = not killed_at(event_number, lambda: save_perta_adapter(path, *new))
        strengths.append(strength_of(path) if path.exists() else None)
        if first and path.exists():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        if alive:
            break
    before = None if first else 1.0
    assert alive, "more system calls than tried"
    assert len(strengths) > 10, "the child was killed at many places"
    assert set(strengths) == {before, 2.0}
    assert strengths[-1] == 2.0
    # Once the new directory is in place, a later kill does not remove it.
    assert strengths.index(2.0) == strengths.count(before)


def test_a_directory_of_ours_is_replaced(old_and_new, tmp_path):
    path = tmp_path / "deep" / "out"
    for result in old_and_new:
        assert save_perta_adapter(path, *result) == path
        assert strength_of(path) == result[2].config["strength"]
        assert os.listdir(path.parent) == ["out"], "no temporary directory is left"
    assert path.stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert PeftModel.from_pretrained(builders.llama(), path)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_without_an_atomic_exchange_it_is_replaced_too(old_and_new, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_perta.data.output._exchange", lambda source, target: False)
    for result in old_and_new:
        save_perta_adapter(tmp_path / "out", *result)
    assert strength_of(tmp_path / "out") == 2.0
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_is_accepted(old_and_new, tmp_path):
    (tmp_path / "out").mkdir()
    save_perta_adapter(tmp_path / "out", *old_and_new[0])
    assert strength_of(tmp_path / "out") == 1.0


def test_a_directory_with_files_of_others_is_refused(old_and_new, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="exists and was not written by peft_perta"):
        save_perta_adapter(tmp_path, *old_and_new[0])
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_is_refused(old_and_new, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match=r"is a file, expected a new directory; choose another output"):
        save_perta_adapter(tmp_path / "out", *old_and_new[0])
    with pytest.raises(OutputError, match=r"out/inner.*(cannot|could not) be written"):
        save_perta_adapter(tmp_path / "out" / "inner", *old_and_new[0])
    assert (tmp_path / "out").read_text() == "x"


@pytest.mark.parametrize("replaced", ["save_file", "model_card"])
def test_a_full_disk_changes_nothing(replaced, old_and_new, tmp_path, monkeypatch):
    path = save_perta_adapter(tmp_path / "out", *old_and_new[0])

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"peft_perta.adapters.emitted.{replaced}", full)
    with pytest.raises(OutputError, match=r"could not be written: .*No space left on device.*nothing was changed"):
        save_perta_adapter(path, *old_and_new[1])
    assert strength_of(path) == 1.0
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def small_files():
    """The system refuses to write more than 4 KiB into a file, like a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_the_system_cuts_short_changes_nothing(old_and_new, tmp_path, small_files):
    path = save_perta_adapter(tmp_path / "out", *old_and_new[0])
    small_files()
    with pytest.raises(OutputError, match="could not be written"):
        save_perta_adapter(path, *old_and_new[1])
    assert strength_of(path) == 1.0
    assert os.listdir(tmp_path) == ["out"]


def test_a_block_that_raises_changes_nothing(tmp_path):
    def write_and_raise():
        with replaced_directory(tmp_path / "out", "mark") as directory:
            (directory / "mark").write_text("half")
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        write_and_raise()
    assert not os.listdir(tmp_path)


def test_checking_writes_nothing(tmp_path):
    assert check_output(tmp_path / "a" / "b", "mark") == tmp_path / "a" / "b"
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="no permission"):
        check_output(tmp_path / "out", "mark")


def test_provenance_is_saved_without_its_wall_times(old_and_new, tmp_path):
    config, state_dict, provenance = old_and_new[0]
    other = dataclasses.replace(provenance, seconds={"x": 1.0})
    assert load_provenance(save_perta_adapter(tmp_path / "out", config, state_dict, other))[0] == dataclasses.replace(
        provenance, seconds={}
    )


def test_a_path_under_a_file_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(OutputError, match=r"rows\.jsonl is a file; choose another output"):
        check_output(tmp_path / "rows.jsonl" / "out", "marker")


# What is not ours


@pytest.fixture
def ours(old_and_new, tmp_path):
    return save_perta_adapter(tmp_path / "out", *old_and_new[0])


def test_a_directory_lists_its_files_and_is_replaced_with_what_a_command_added(ours, old_and_new):
    assert json.loads((ours / "perta_provenance.json").read_text())["written"] == FILES
    for name in ("report.html", "strength.png"):
        (ours / name).write_text("x")
    save_perta_adapter(ours, *old_and_new[1])
    assert strength_of(ours) == 2.0


@pytest.mark.parametrize("name", ["mine.jsonl", "deep/mine.jsonl", "empty/", "link"])
def test_a_directory_with_a_file_of_the_user_is_not_replaced(name, ours, old_and_new, tmp_path):
    mine = ours / name
    if name == "link":
        mine.symlink_to(tmp_path)
    elif name.endswith("/"):
        mine.mkdir()
    else:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("years of work")
    with pytest.raises(OutputError, match=rf"would be replaced, and {name.rstrip('/')} in it was not written by peft_"):
        save_perta_adapter(ours, *old_and_new[1])
    assert mine.is_symlink() or mine.exists()
    provenance, _ = load_provenance(ours)
    assert provenance.config["strength"] == 1.0


@pytest.mark.parametrize("marker", ["", "{}", "[]", "null", '{"written": 3}', "[" * 100_000])
def test_a_foreign_directory_with_a_marker_is_not_replaced(marker, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "perta_provenance.json").write_text(marker)
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="does not list the files that belong to it"):
        check_output(tmp_path / "out", "perta_provenance.json")
    check_output(tmp_path / "out", "perta_provenance.json", grows=True)


def test_what_is_put_there_while_the_run_computes_stays(ours):
    def write() -> None:
        with replaced_directory(ours, "perta_provenance.json") as directory:
            (directory / "perta_provenance.json").write_text("{}")
            (ours / "mine.txt").write_text("x")

    with pytest.raises(OutputError, match=r"mine\.txt in it was not written"):
        write()
    assert (ours / "mine.txt").read_text() == "x"


def test_links_mount_points_and_the_working_directory_are_refused(ours, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(ours)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for link in ("link", "dangling"):
        with pytest.raises(OutputError, match="is a link, expected a new directory"):
            check_output(tmp_path / link, "perta_provenance.json")
    monkeypatch.chdir(ours)
    with pytest.raises(OutputError, match=r"\. is the working directory, which cannot be replaced"):
        check_output(".", "perta_provenance.json")
    with pytest.raises(OutputError, match="is a mount point"):
        check_output("/proc", "perta_provenance.json")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_every_file_follows_the_umask(mask, old_and_new, tmp_path):
    before = os.umask(mask)
    try:
        path = save_perta_adapter(tmp_path / "out", *old_and_new[0])
        write_file(tmp_path / "x.txt", "x")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (*path.iterdir(), tmp_path / "x.txt")}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)


# Temporary names


def left_over(tmp_path, process, name="out"):
    """What a process leaves that is killed while it writes."""
    script = (
        "import os, sys; from pathlib import Path; from peft_perta.data import output\n"
        "os.getpid = lambda: int(sys.argv[1]); path = output._temporary(Path(sys.argv[2]))\n"
        "path.mkdir(); (path / 'x').write_text('x')"
    )
    subprocess.run([sys.executable, "-c", script, str(process), str(tmp_path / name)], check=True)
    (path,) = tmp_path.glob(f".{name}.*-{process}-*.partial")
    return path


def test_left_overs_of_dead_processes_go_and_others_stay(old_and_new, tmp_path):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    dead, alive = left_over(tmp_path, finished.pid), left_over(tmp_path, os.getppid())
    other = left_over(tmp_path, finished.pid, "another")
    foreign = tmp_path / ".out.partial"
    foreign.mkdir()
    save_perta_adapter(tmp_path / "out", *old_and_new[0])
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()
    assert foreign.exists()


def test_a_kill_before_the_marker_is_there_does_not_block_the_same_run(tmp_path):
    """Of a directory that grows: it then holds the left-over of its marker, and nothing else."""
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    out, busy = tmp_path / "out", tmp_path / "busy"
    for directory, process in ((out, finished.pid), (busy, os.getppid())):
        directory.mkdir()
        left_over(directory, process, "m.json")
    with claimed_directory(check_output(out, "m.json", grows=True), "m.json", "{}"):
        (out / "log.json").write_text("{}")
    assert sorted(os.listdir(out)) == ["log.json", "m.json"]
    with pytest.raises(OutputError, match="was not written by peft_perta"):
        check_output(busy, "m.json", grows=True)


def test_one_process_at_a_time_claims_a_directory(tmp_path):
    """The lock leaves no file, and is gone with the process that had it."""
    out = tmp_path / "out"
    with claimed_directory(out, "m.json", "{}"):
        refused = pytest.raises(OutputError, match="out is in use by another process, which writes its results there")
        with refused, claimed_directory(out, "m.json", "{}"):
            pytest.fail("both were in")
        assert os.listdir(out) == ["m.json"]
        (out / "log.json").write_text("{}")
    child = os.fork() if hasattr(os, "fork") else None
    if child == 0:
        with claimed_directory(out, "m.json", "{}"):
            os.kill(os.getpid(), signal.SIGKILL)
    if child is not None:
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with claimed_directory(out, "m.json", "{}"):
        assert sorted(os.listdir(out)) == ["log.json", "m.json"]


def test_a_link_in_place_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("years of work")
    (tmp_path / "guessed").symlink_to(tmp_path / "victim")
    monkeypatch.setattr("peft_perta.data.output._temporary", lambda path: tmp_path / "guessed")
    with pytest.raises(OutputError, match="File exists"):
        write_file(tmp_path / "x.txt", "x")
    assert (tmp_path / "victim").read_text() == "years of work"


def test_two_writers_do_not_disturb_each_other(tmp_path):
    out = tmp_path / "out"
    with replaced_directory(out, "m.json") as first, replaced_directory(out, "m.json") as other:
        for directory, text in ((first, "first"), (other, "other")):
            (directory / "m.json").write_text(json.dumps({"by": text}))
    assert json.loads((out / "m.json").read_text())["by"] == "first"  # it ended last


@pytest.mark.parametrize("length", [200, 250])
def test_a_long_name_can_be_written(length, tmp_path):
    write_file(tmp_path / ("n" * length), "x")
    with replaced_directory(tmp_path / ("d" * length), "m.json") as directory:
        (directory / "m.json").write_text("{}")
    assert (tmp_path / ("d" * length) / "m.json").is_file()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_directory_is_removed_as_a_whole(tmp_path):
    for event_number in range(1, 1000):
        path = tmp_path / "checkpoint"
        path.mkdir(exist_ok=True)
        for name in ("a", "b", "run.json"):
            (path / name).write_text("x")
        alive = not killed_at(event_number, lambda: remove_directory(path))  # noqa: B023
        assert not path.exists() or len(os.listdir(path)) == 3
        if alive:
            break
    remove_directory(path)
    assert os.listdir(tmp_path) == [], "what the killed ones left is gone"


# Inputs in the output


def given(output, **options):
    return argparse.Namespace(output=str(output), command_line="peft-perta x", **options)


def test_an_input_in_the_output_is_refused(ours, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    check_output_of(
        given(ours, forget=str(tmp_path / "rows.jsonl"), retain=None, dtype="float32"), "perta_provenance.json"
    )
    inside = {
        "adapter": str(ours),
        "adapters": [str(tmp_path / "rows.jsonl"), f"{ours}:0.5"],
        "suite": [f"tofu={ours}"],
        "forget": f"{ours}/../out/adapter_config.json",
    }
    for name, value in inside.items():
        with pytest.raises(OutputError, match=f"--{name}: .* is in the output .*out, which will be written anew"):
            check_output_of(given(ours, **{name: value}), "perta_provenance.json")
    (tmp_path / "link").symlink_to(ours)
    with pytest.raises(OutputError, match=r"--adapter: .*link is in the output"):
        check_output_of(given(ours, adapter=str(tmp_path / "link")), "perta_provenance.json")


def test_a_file_is_overwritten_only_if_asked(tmp_path):
    check_file(tmp_path / "new.json", overwrite=False)
    (tmp_path / "old.json").write_text("{}")
    check_file(tmp_path / "old.json", overwrite=True)
    with pytest.raises(OutputError, match=r"old\.json exists; add --overwrite to replace it"):
        check_file(tmp_path / "old.json", overwrite=False)
    with pytest.raises(OutputError, match="is a directory, expected the name of a file"):
        check_file(tmp_path, overwrite=True)
