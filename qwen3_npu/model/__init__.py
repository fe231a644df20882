"""The Qwen3 model: architecture facts, ModuleSpec, modules, GPTModel."""
