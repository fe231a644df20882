"""LoRA (arXiv:2106.09685): low-rank adapters beside frozen weights, W x + (alpha / r) B A x; rsLoRA: alpha / sqrt(r).

Names and shapes are MindSpeed-LLM's, so checkpoints are exchanged:

    linear_qkv, linear_fc1    base_layer.weight, lora_A.default.weight [r, in], lora_B.default.weight [out/tp, r]
    linear_proj, linear_fc2   base_layer.weight, lora_A.default.weight [r, in/tp], lora_B.default.weight [out, r]
    output_layer, word_embeddings    base_layer.weight, lora_A.default.weight, lora_B.default.weight
    experts                   weight1_lora_a/_lora_b, weight2_lora_a/_lora_b, one adapter per expert

With DoRA (arXiv:2402.09353) a linear has lora_magnitude_vector.default.weight [out(/tp)], too. One A serves q, k and v,
and one serves gate and up.
"""
