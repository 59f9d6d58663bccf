"""Programs that answer prompts in an engine: scripts of their own, which import nothing of Expertune."""
