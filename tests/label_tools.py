"""A candidates file for the tests of labels."""

import json


def candidates(path, prompts=4, completions=2, **changes):
    """A candidates file of `prompts` lines."""
    rows = [
        {
            "id": f"p{i}", "prompt": f"question {i}", "split": "train", "round": 0, "model": "m",
            "completions": [{"text": f"answer {i} {j}", "tokens": 3, "logp": -1.0} for j in range(completions)],
        } | changes
        for i in range(prompts)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
