"""The mathematics of the stages as pure functions of tensors; no config, tokenizer, model or process rank."""
