"""What reproduces the figures of the Doge-ADMM and mAIHT papers: their rival methods, settings and tasks."""
