"""The player: engines, chat rendering, rollouts and the episodes they leave behind."""
