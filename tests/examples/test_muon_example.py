"""The example of Muon runs, and says what it steps by what."""

import re


def test_the_example_trains(run_example, monkeypatch, short_text):
    import muon

    monkeypatch.setattr(muon, "load_text", lambda: short_text)
    printed = run_example(muon, "--steps=30")
    assert re.search(r"blocks\.0\.query_key_value\.weight +192 × 64 +12,288 +Muon", printed)
    assert re.search(r"token\.weight .*AdamW", printed)
    loss = float(re.search(r"validation loss ([\d.]+)", printed)[1])
    assert 0 < loss < 4.6
