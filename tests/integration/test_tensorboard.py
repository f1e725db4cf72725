# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Logs of a job on a compute node, shown by TensorBoard on the workstation, copied and mounted."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator

import pytest
from browser import Browser
from target import Target, Workstation

# For a job, TensorBoard or a page: a loaded machine takes ten times as long as an idle one.
SECONDS = 120
# Writes five values a turn, and waits for the next turn.
WRITE = """
import os, sys, time
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
writers = [EventFileWriter(folder) for folder in sys.argv[1:]]
for turn in range(1, 10):
    while not os.path.exists(f"turn {turn}"):
        time.sleep(0.1)
    for step in range(5 * turn - 5, 5 * turn):
        for number, writer in enumerate(writers):
            value = Summary.Value(tag="loss", simple_value=1 / (step + 1 + number))
            writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))
    for writer in writers:
        writer.flush()
    open(f"done {turn}", "w").close()
"""
# No shell and no option parser may take this for anything but a name.
BERYLLIUM = "-x it's \"be\" $(touch canary) ;&"
BANNER = "Welcome, quota 81 %"
LOGS = [{"name": "beryllium", "path": f"~/{BERYLLIUM}/logs"}, {"name": "aluminium", "path": "~/aluminium"}]
FOLDER = ".local/share/mala.hpc_db/mini/hpc_db/tensorboard"
# Prints the values of each run from TensorBoard's HTTP API; a run may just have gone.
ASK = """
import json, sys, urllib.error, urllib.parse, urllib.request
def ask(path):
    return json.load(urllib.request.urlopen(sys.argv[1] + "data/" + path, timeout=60))
said = {"title": ask("environment")["window_title"], "runs": {}}
for run, tags in ask("plugin/scalars/tags").items():
    try:
        said["runs"][run] = {tag: ask("plugin/scalars/scalars?" + urllib.parse.urlencode({"run": run, "tag": tag}))
                             for tag in tags}
    except urllib.error.HTTPError:
        pass
print(json.dumps(said))
"""
# Counts the colours of each canvas; a colour counts from the size of a short line.
COLOURS = """
const most = canvas => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d');
  copy.drawImage(canvas, 0, 0);
  const {data} = copy.getImageData(0, 0, canvas.width, canvas.height), counts = {};
  for (let i = 0; i < data.length; i += 4) {
    const colour = [0, 1, 2].map(part => data[i + part] >> 5);
    if (data[i + 3] > 200) counts[colour] = (counts[colour] || 0) + 1;
  }
  return Object.values(counts).filter(count => count > 30).length;
};
return Math.max(0, ...[...arguments].map(canvas => canvas.width && canvas.height ? most(canvas) : 0));
"""


@pytest.fixture(scope="module")
def job(mini: Target) -> Iterator[Callable[[int], None]]:
    """A job that writes into both folders; call the fixture with 1, 2 and so on to write the next values.

    The login node's shell prints a line at each login and each command over ssh.
    """
    mini.run(f"echo 'echo {BANNER}' > .bashrc")
    packages = "tensorboard protobuf numpy absl-py packaging typing-extensions"
    mini.run(f"pip3 install --quiet --no-index --find-links=/srv/wheels --no-deps --no-compile --target=lib {packages}")
    folders = shlex.join([f"./{BERYLLIUM}/logs", "aluminium/first", "aluminium/second"])
    mini.run(f"cat > write.py <<'EOF'\n{WRITE}\nEOF")
    command = shlex.quote(f"PYTHONPATH=lib exec python3 write.py {folders}")
    number = answer(mini, f"sbatch --parsable --partition=work --mem=500M --output=write.log --wrap={command}")

    def write(turn: int) -> None:
        mini.run(f"touch 'turn {turn}'")
        wait_for(lambda: answer(mini, f"ls 'done {turn}' || ! cat write.log | grep Error") == f"done {turn}")

    yield write
    mini.run(f"scancel {number}")


def answer(mini: Target, script: str) -> str:
    """Run a shell script on the login node; return its output after the banner."""
    banner, after, printed = mini.run(script).partition(BANNER)
    assert (banner, after) == ("", BANNER)
    return printed.strip()


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


class Page:
    """The TensorBoard on the workstation."""

    def __init__(self, workstation: Workstation, played: str) -> None:
        found = re.search(r"^TensorBoard shows [\w, ]+: (http://127\.0\.0\.1:\d+/)$", played, re.MULTILINE)
        assert found, played
        self.address = found[1]
        self._workstation = workstation

    def ask(self) -> dict:
        return json.loads(self._workstation.run(shlex.join(["/usr/bin/python3", "-c", ASK, self.address])))

    def wait_for(self, **values: list[float]) -> None:
        """Wait until exactly these runs are shown, with these values."""
        wanted = {run: {"loss": list(enumerate(map(rounded, losses)))} for run, losses in values.items()}

        def shown() -> dict:
            return {
                run: {tag: [(step, rounded(value)) for _time, step, value in points] for tag, points in tags.items()}
                for run, tags in self.ask()["runs"].items()
            }

        wait_for(lambda: shown() == wanted)


def rounded(value: float) -> float:
    """Round a value for comparison: TensorBoard stores 32 bits."""
    return round(value, 5)


def written(turns: int) -> dict[str, list[float]]:
    """Return the values that the job has written in these turns, in the order of its folders."""
    names = ["beryllium", "aluminium/first", "aluminium/second"]
    return {name: [1 / (step + 1 + number) for step in range(5 * turns)] for number, name in enumerate(names)}


def play(workstation: Workstation, method: str, *options: str, **settings: object) -> str:
    """Show the logs; return the playbook's output."""
    usual = {"tensorboard_logs": LOGS, "tensorboard_method": method, "tensorboard_reload_interval": 1}
    played = workstation.play("tensorboard", {**usual, **settings}, *options)
    assert played.returncode == 0, played.stdout
    return played.stdout


def colours(chromium: Browser) -> int:
    """Return the number of differently coloured lines in a plot."""
    return chromium.driver.execute_script(COLOURS, *chromium.find("line-chart canvas"))


def left(workstation: Workstation) -> str:
    """Return alice's processes and mounts on the workstation that should have gone."""
    return workstation.run(
        "ps -o args= -u alice | grep -E 'tensorboard|sshfs|rsync' | grep -v grep; grep sshfs /proc/self/mountinfo || :"
    )


def test_bad_input_is_refused(workstation: Workstation) -> None:
    bad = {"tensorboard_logs": [{"name": "a b", "path": "runs"}], "tensorboard_reload_interval": 0}
    absent = {"tensorboard_logs": [{"name": "absent", "path": "~/$(touch canary)"}]}
    used = {"tensorboard_logs": [{"name": "home", "path": "/home/alice"}], "tensorboard_root": "~/used"}
    workstation.run("mkdir -p used/logs/mine; ln -s nowhere used/logs/other")

    refused = " ".join(workstation.play("tensorboard", bad).stdout.split())
    missed = " ".join(workstation.play("tensorboard", absent).stdout.split())
    kept = [
        " ".join(workstation.play("tensorboard", {**used, "tensorboard_state": state}).stdout.split())
        for state in ("started", "stopped")
    ]

    assert "tensorboard_logs: a b is not allowed; unique names of letters, digits" in refused
    assert "tensorboard_logs: runs is not allowed; each path begins with / or ~/" in refused
    assert "tensorboard_reload_interval: 0 is not allowed; 1 second or more" in refused
    assert "tensorboard_logs: ~/$(touch canary) is not a folder on mini; give an existing one" in missed
    for said in kept:
        assert re.search(r"tensorboard_root: /\S+/used/logs/mine is not a link; move it away, or give", said), said
    assert workstation.run("ls -A used; ls used/logs").split() == ["logs", "mine", "other"]
    assert workstation.run("ls -d .local || :") == ""


def test_copy_brings_what_is_new(mini: Target, workstation: Workstation, job: Callable[[int], None]) -> None:
    job(1)

    assert " failed=0 " in play(workstation, "copy", "--check")
    assert workstation.run("ls -d .local || :") == ""
    shown = play(workstation, "copy")

    assert re.search(r"^\[mini\] beryllium: 1 files, 0\.0 MB in \d+ s$", shown, re.MULTILINE), shown
    assert re.search(r"^\[mini\] aluminium: 2 files, 0\.0 MB in \d+ s$", shown, re.MULTILINE), shown
    page = Page(workstation, shown)
    page.wait_for(**written(1))
    assert page.ask()["title"] == "hpc_db on mini"

    job(2)
    assert Page(workstation, play(workstation, "copy")).address == page.address
    page.wait_for(**written(2))
    assert re.search(r"^mini .* changed=0 ", play(workstation, "copy"), re.MULTILINE)
    assert answer(mini, "find . -name canary") == workstation.run("find . -name canary") == ""


def test_folders_of_this_machine_are_shown_where_they_are(workstation: Workstation) -> None:
    workstation.run(f"mkdir own; cp -r {FOLDER}/copies/aluminium/first own")
    logs = [{"name": "own", "path": "~/own"}]

    page = Page(workstation, play(workstation, "mount", ansible_connection="local", tensorboard_logs=logs))

    page.wait_for(**{"own/first": written(2)["aluminium/first"]})
    assert "sshfs" not in left(workstation)


def test_mount_shows_what_is_written(
    workstation: Workstation, job: Callable[[int], None], browser: Callable[..., Browser]
) -> None:
    job(1)
    job(2)
    page = Page(workstation, play(workstation, "mount"))
    page.wait_for(**written(2))

    job(3)
    page.wait_for(**written(3))
    again = play(workstation, "mount")
    assert re.search(r"^mini .* changed=0 ", again, re.MULTILINE), again

    chromium = browser(workstation)
    chromium.open(page.address)
    for text in ("beryllium", "aluminium/first", "loss", "0.0667"):  # the last is beryllium's newest value
        chromium.wait_for_text(text)
    chromium.wait_for(lambda: colours(chromium) >= 3)
    chromium.screenshot("tensorboard")
    assert all(address.startswith((page.address, "data:", "blob:")) for address in chromium.requests())


def test_stop_leaves_nothing(workstation: Workstation) -> None:
    play(workstation, "mount", tensorboard_logs=LOGS[:1])
    found = left(workstation)
    assert "/mounts/beryllium " in found and "tensorboard.main" in found
    assert "/mounts/aluminium " not in found, found

    links = workstation.run(f"find {FOLDER}/logs -type l -printf '%f %l'")
    assert re.fullmatch(rf"beryllium /\S+/{FOLDER}/mounts/beryllium", links.strip()), links
    planned = workstation.play("tensorboard", {"tensorboard_state": "stopped"}, "--check")
    assert re.search(r"^mini .* changed=[1-9].* failed=0 ", planned.stdout, re.MULTILINE), planned.stdout
    assert workstation.run(f"find {FOLDER}/logs -type l -printf '%f %l'") == links and left(workstation) == found

    stopped = workstation.play("tensorboard", {"tensorboard_state": "stopped"})

    assert stopped.returncode == 0, stopped.stdout
    assert left(workstation) == ""
    workstation.run(f"rm -rf {FOLDER}/copies")
    kept = workstation.run(f"ls {FOLDER}; find {FOLDER}/logs -mindepth 1; find {FOLDER} ! -type l -perm /077")
    # The last file is TensorBoard's own: readable by everyone, but inside a private folder.
    wanted = ["logs", "python", "tensorboard.json", "tensorboard.log", f"{FOLDER}/.tensorboard-info"]
    assert kept.split() == wanted
    again = workstation.play("tensorboard", {"tensorboard_state": "stopped"})
    assert re.search(r"^mini .* changed=0 .* failed=0 ", again.stdout, re.MULTILINE), again.stdout
