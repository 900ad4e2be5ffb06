"""02_finetune: what is trained, on what, and how."""
