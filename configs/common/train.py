"""Training settings shared by all recipes; the engine fills in what isn't named here."""

train = dict(
    output_dir="output",
    init_checkpoint="",
    seed=0,
    device="auto",
    max_iter=90000,
    amp=dict(enabled=True, dtype="bfloat16"),
    clip_grad=dict(enabled=True, max_norm=0.1, norm_type=2.0),
    ema=dict(enabled=False, decay=0.9998),
    checkpointer=dict(period=5000, max_to_keep=3),
    eval_period=5000,
    log_period=20,
)
