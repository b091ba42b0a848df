from fm_jax import listing


def test_a_table_aligns_names_left_and_numbers_right():
    rows = [("name", "n"), ("a", "1"), ("longer", "100")]
    assert listing.columns(rows) == ["name      n", "a         1", "longer  100"]


def test_states_are_counted_in_the_order_in_which_they_come():
    assert listing.summary(["done", "lost", "done"]) == "3 runs: 2 done, 1 lost"
    assert listing.summary(["done"]) == "1 run: 1 done"
