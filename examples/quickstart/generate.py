"""Continue a prompt with an exported model, in plain transformers: nothing of this project."""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=30, do_sample=False)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
