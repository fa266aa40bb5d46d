"""Held-out pairs as files."""

from __future__ import annotations

import pytest
from textures import texture

from patchscaler.evaluation.metrics import to_8bit
from patchscaler.evaluation.pairs import find_pairs, read_truth
from patchscaler.images import Picture, bicubic, read_picture, write_png
from patchscaler.training import held_out
from patchscaler.training.data import ImageBank, part_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty images, of whose names the checksum holds some out."""
    folder = tmp_path_factory.mktemp("data")
    for seed in range(40):
        write_png(Picture(texture(72, 80, seed)), folder / f"{seed}.png")
    return folder


def test_pairs_are_of_held_out_images_and_fit(data, tmp_path, monkeypatch):
    banks = []

    def watched(*args, **options):
        banks.append(ImageBank(*args, **options))
        return banks[0]

    monkeypatch.setattr(held_out, "ImageBank", watched)
    held_out.main(["--data", str(data), "-o", str(tmp_path), "--count", "4", "--size", "64"])
    assert 0 < len(banks[0]) < 40 and all(part_of(name) == "held-out" for name in banks[0].names)
    pairs = find_pairs(tmp_path / "lr", tmp_path / "hr")
    assert [low.name for low, _ in pairs] == ["000.png", "001.png", "002.png", "003.png"]
    for low, high in pairs:
        enlarged = bicubic(read_picture(low).rgb[None])[0]
        truth = read_truth(high, enlarged)  # of four times the size
        assert (truth - enlarged).abs().mean() < (truth - enlarged.flip(-1)).abs().mean()


def test_the_same_seed_draws_the_same_pairs(data, tmp_path):
    bank = ImageBank(data, part="held-out")
    for name in ("a", "b"):
        held_out.write_pairs(bank, tmp_path / name, 2, 64)
    for kind in ("lr", "hr"):
        first, second = (read_picture(tmp_path / name / kind / "001.png").rgb for name in ("a", "b"))
        assert to_8bit(first).equal(second)


def test_files_that_are_there_stay(data, tmp_path, capsys):
    photo = tmp_path / "hr" / "000.png"
    photo.parent.mkdir()
    photo.write_bytes(b"a photograph")
    with pytest.raises(SystemExit) as stop:
        held_out.main(["--data", str(data), "-o", str(tmp_path), "--count", "1", "--size", "64"])
    assert stop.value.code == 1 and f"{photo.parent} has files already" in capsys.readouterr().err
    assert photo.read_bytes() == b"a photograph" and not any((tmp_path / "lr").iterdir())


def test_a_side_that_four_does_not_divide_is_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        held_out.main(["--data", str(data), "-o", str(tmp_path), "--size", "66"])
    assert stop.value.code == 1 and "66×66" in capsys.readouterr().err
