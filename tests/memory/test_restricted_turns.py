"""What a reply was restricted to survives the store, so that training can make its mask again."""


def test_choices_come_back_as_they_were(store, make_episode):
    free = make_episode()
    turns = (free.turns[0].model_copy(update={"choices": ("go east", 'say "hi"', "öffne Tür")}), *free.turns[1:])
    sampling = free.sampling.model_copy(update={"admissible_only": True})
    store.add_episodes([free.model_copy(update={"id": "restricted", "turns": turns, "sampling": sampling}), free])
    restricted = store.episode("restricted")
    assert restricted.turns[0].choices == ("go east", 'say "hi"', "öffne Tür")
    assert restricted.sampling.admissible_only
    assert store.episode(free.id).turns == free.turns
    assert store.episode(free.id).turns[0].choices is None
