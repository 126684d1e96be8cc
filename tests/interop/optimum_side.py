"""What runs in optimum's own environment: `python optimum_side.py causal|features FOLDER FILE IDS NEW`, JSON out.

Only optimum and what it needs is imported; the tests compare what it prints.
"""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForFeatureExtraction

what, folder, file, ids, new = sys.argv[1:6]
rows = torch.tensor(json.loads(ids))
if what == "causal":
    model = ORTModelForCausalLM.from_pretrained(folder, file_name=file)
    assert model.can_use_cache
    mask = torch.ones_like(rows)
    out = model.generate(
        rows, attention_mask=mask, max_new_tokens=int(new), do_sample=False, eos_token_id=None, pad_token_id=0
    )
    result = out[:, rows.shape[1] :].tolist()
else:
    model = ORTModelForFeatureExtraction.from_pretrained(folder, file_name=file)
    given = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "token_type_ids": torch.zeros_like(rows)}
    taken = {name: value for name, value in given.items() if name in model.input_names}
    result = model(**taken).last_hidden_state.tolist()
print("RESULT " + json.dumps(result))
