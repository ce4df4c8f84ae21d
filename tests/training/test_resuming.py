"""What a resumed run says about its settings."""

import training

TINY = [
    *("training.num_steps=2", "training.batch_size=4", "data.num_samples=60", "evaluation.prompts_per_question=0"),
    *("model.depth=1", "model.num_heads=1", "model.head_dim=16", "text.width=16", "text.depth=1"),
    *("sampling.num_steps=2", "training.validate_every=0", "training.sample_every=0"),
]


def test_the_log_says_which_settings_are_other_from_which_step_on(tmp_path):
    config = training.load_config("pixels-tiny", [*TINY, f'training.out="{tmp_path / "run"}"'])
    run = training.train(config)

    def said():
        lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
        return [line.split(" ", 2)[2] for line in lines if "from here on" in line or "resumed at" in line]

    changed = ["optimizer.schedule=cosine", "optimizer.betas=[0.8,0.9]", "training.num_steps=3"]
    training.resume(run, changed)
    first = said()
    old = config.optimizer
    assert first == [
        "resumed at step 2",
        f"optimizer.betas = [0.8,0.9] from here on, was [{old.betas[0]},{old.betas[1]}]",
        f"optimizer.schedule = cosine from here on, was {old.schedule}",
        "training.num_steps = 3 from here on, was 2",
    ]
    training.resume(run)
    assert said() == [*first, "resumed at step 3"], "and nothing where none is"
