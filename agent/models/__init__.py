"""Where model folders come from: hub ids, local folders, and models carried inside wheels."""
