"""Gates where people already train: one file for each library, and one core that they share.

    from surgeon.integrations.transformers import GateCallback  # Hugging Face's Trainer
    from surgeon.integrations.lightning import GateCallback     # Lightning
    from surgeon.integrations.accelerate import GateTraining    # loops of your own over accelerate

docs/integrations.md shows them, and what other trainers need.
"""
