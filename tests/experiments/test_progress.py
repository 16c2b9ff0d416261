"""Progress of reading files: shown for long work only, each kind of work by itself."""

from experiments.progress import Reading


def test_long_reading_is_shown_and_each_kind_by_itself(capsys):
    with Reading(after=0.0) as progress:
        for what, steps in (("checking images", (64, 100)), ("reading images", (64, 90))):
            for done in steps:
                progress(what, done, steps[-1])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed] == ["checking images 100/100", "reading images 90/90"]


def test_the_same_work_twice_is_counted_from_the_start(capsys):
    with Reading(after=0.0) as progress:
        for done, total in ((50, 100), (100, 100), (30, 60), (60, 60)):
            progress("checking images", done, total)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed] == ["checking images 100/100", "checking images 60/60"]


def test_short_reading_is_not_shown(capsys):
    with Reading(after=60.0) as progress:
        for done in (1, 2):
            progress("checking images", done, 2)
    assert capsys.readouterr().out == ""
