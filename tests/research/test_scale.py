"""A run under faults, and the arithmetic of a large one."""

import pytest

from research import long_run, rehearse


@pytest.mark.slow
def test_a_run_through_kills_full_disks_and_a_jumping_clock_ends_as_one_without(tmp_path, capsys):
    """It fails by itself where there was no kill, or no checkpoint that could not be written."""
    flags = ["--max_train_steps", "100", "--checkpointing_steps", "5", "--seconds", "0.2"]
    args = long_run.parse_args(["--output_dir", str(tmp_path / "run"), *flags])
    long_run.main(args)
    assert "files that differ: none" in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists: give a new folder"):
        long_run.main(args)


def test_what_a_whole_run_needs_follows_from_flops_and_parameters(tmp_path, monkeypatch):
    args = rehearse.parse_args(["--preset", "tiny", "--plan", "--output_dir", str(tmp_path / "out")])
    planned = rehearse.main(args)["planned"]
    eight, many = planned["runs"]
    flops, weights = planned["training_flops_per_image"], planned["parameters"]
    assert planned["gpu_days"] == pytest.approx(flops * 8 * 4 / (0.4 * 989e12) / 86400)  # 4 steps of 8 images
    assert eight["days"] == pytest.approx(planned["gpu_days"] / 8) == pytest.approx(8 * many["days"])
    assert eight["images_per_second"] * eight["seconds_per_step"] == pytest.approx(8)
    assert eight["raw_bytes_per_second"] == pytest.approx(eight["images_per_second"] * 16 * 16 * 3)
    kept = planned["kept_bytes_per_image"]
    assert kept > 0 and eight["gpu_bytes"] == pytest.approx(26 * weights + kept)  # one image on each of eight
    assert eight["gpu_bytes_fsdp2"] == pytest.approx(26 * weights / 8 + kept)
    assert planned["checkpoint_bytes"] == 16 * weights
    with pytest.raises(ValueError, match="exists: give a new folder"):
        rehearse.main(args)
    new = ["--output_dir", str(tmp_path / "new" / "out")]
    monkeypatch.setattr(rehearse, "DISK", 1e30)
    with pytest.raises(ValueError, match="of free disk"):
        rehearse.main(rehearse.parse_args(["--preset", "imagenet64", *new]))
    assert not (tmp_path / "new").exists()
