"""What each `model_type` of Hugging Face is in our terms: fields and names, both ways."""
