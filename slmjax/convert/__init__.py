"""To and from Hugging Face folders: `python -m slmjax.convert from-hf` and `to-hf`."""
