"""The benchmark of exported MoE layers: all forms compute the layer, in two runtimes."""

import export_layer
import pytest
from lib import tables


def test_forms_agree_and_the_fastest_is_marked(tmp_path, capsys):
    asked = ["--layers", "8x16", "--experts", "4", "--repeats", "2"]
    export_layer.main([*asked, "--runtimes", "onnxruntime", "torch"])
    printed = capsys.readouterr().out
    assert printed.count("**") == 4
    row = export_layer.measure("onnxruntime", "8x16", 4, repeats=2, threads=1)
    assert all(form["error"] < 1e-5 for form in row["forms"].values())
    forms = row["forms"]
    assert forms["tiles"]["ratio"] == pytest.approx(
        forms["tiles"]["median_ms"] / forms["dense"]["median_ms"]
    )
    forms["tiles"]["ratio"] = 0.001
    assert "**0.00**" in tables.export_layer({"settings": {"threads": 1}, "rows": [row]})
