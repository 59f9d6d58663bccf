"""Programs that answer prompts, each in a process of its own. What runs an engine imports nothing of Expertune."""
