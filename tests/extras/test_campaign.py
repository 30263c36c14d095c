"""The campaign tries what it says, and a failure is counted; here with few tries."""

import re

import campaign
import pytest

from oaa_lib.maps.seals import Seals

KINDS = ("kills", "flips", "flips-in-use", "other-damage", "truncations", "full-disks", "interrupts", "forks", "steps")


def arguments(**tries):
    return [part for kind in KINDS for part in (f"--{kind}", str(tries.get(kind.replace("-", "_"), 0)))]


def rows(text):
    return {
        name: (int(tries), int(failed)) for name, tries, failed in re.findall(r"\| (.+) \| (\d+) \| (\d+) \|", text)
    }


@pytest.mark.slow
def test_each_kind_is_tried(capsys):
    tries = {"kills": 6, "flips": 8, "flips_in_use": 4, "other_damage": 4, "truncations": 4}
    assert campaign.main(arguments(**tries, full_disks=3, interrupts=6, forks=2)) == 0
    found = rows(capsys.readouterr().out)
    assert sum(number for number, _ in found.values()) == 37
    assert not any(failed for _, failed in found.values())
    for kind in (
        "kill inside",
        "flip in a saved",
        "`verify()`",
        "hole or swap",
        "truncation",
        "full disk",
        "fork, maps",
    ):
        assert any(kind in name for name in found), kind


def test_what_goes_wrong_is_counted(capsys, monkeypatch):
    monkeypatch.setattr(Seals, "check", lambda seals: None)
    assert campaign.main(arguments(flips=40)) == 1
    captured = capsys.readouterr()
    assert sum(failed for _, failed in rows(captured.out).values()) > 5
    assert "flip in a mapped file, try" in captured.err
    assert "other maps, silently" in captured.err
