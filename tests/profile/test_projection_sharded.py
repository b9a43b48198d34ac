"""A study of a cut model, measured for real and projected: from `prottrans scale` to the table."""

from __future__ import annotations

import json

SMALL = ("--steps", "2", "--warmup", "1", "--repetitions", "1", "--set", "phases.0.global_batch_size=4")


def test_a_study_of_a_cut_model_is_projected_from_its_own_passes(prottrans, small_corpus, tmp_path):
    """Real ranks share the cores of this computer: that the parts fit together is looked at here, not how long they took."""
    out = tmp_path / "study"
    command = ("scale", "tiny_prot_bert", "--corpus", str(small_corpus), "--machine", "laptop", "--nodes", "1,2,3,4", *SMALL, "--out", str(out))
    prottrans(*command, "--set", "parallel.sharding=full")
    study = json.loads((out / "scaling.json").read_text())
    assert study["sharing"] == {**study["sharing"], "sharding": "full", "shard_ranks": None, "tensor_ranks": 1, "units": 3}  # two layers and the rest
    told = prottrans("project-scaling", str(out), "--nodes", "1,4,64", "--what-if").stdout
    assert "brings 3 equal parts together" in told
    assert "every rank holds the whole model" in told
    projection = json.loads((out / "projection.json").read_text())
    one, four, many = projection["points"]
    assert projection["hold_out"]["nodes"] == 4
    assert one["communication_s"] == 0.0
    assert four["communication_s"] == four["exposed_comm_s"]  # gloo's collectives hold the passes up
    assert 0 < four["communication_s"] <= many["communication_s"]
    assert many["step_s"] > many["local_s"] > 0
