"""What the bar of a run says of its numbers."""

import re
from pathlib import Path

from diffusers_dualrate.progress import Progress


def test_every_number_that_an_example_notes_is_explained_once_where_it_first_appears(capsys):
    noted = [
        name
        for script in sorted(Path("examples").glob("*.py"))
        for call in re.findall(r"run\.note\((.*)\)", script.read_text(encoding="utf-8"))
        for name in re.findall(r"(\w+)=", call)
    ]
    assert {"loss", "v_loss", "student", "variance_share"} <= set(noted)
    progress = Progress(0, 2, is_shown=True)
    for _ in range(2):
        for name in noted:
            progress.show({name: 0.5}, 1.0)
        progress.advance()
    progress.close()
    printed, bar = capsys.readouterr()
    assert sorted(line.partition(": ")[0] for line in printed.splitlines()) == sorted(set(noted))
    assert "loss=0.5000" in bar and "images/s=1" in bar


def test_a_process_that_shows_no_bar_says_nothing(capsys):
    progress = Progress(0, 1, is_shown=False)
    progress.show({"loss": 0.5})
    progress.advance()
    progress.close()
    assert capsys.readouterr() == ("", "")
