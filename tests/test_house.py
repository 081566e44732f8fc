"""The rooms and their arrows are as CONTRIBUTING draws them."""

from tests.house import find_circles, find_wrong_arrows, list_files_of_a_step


def test_every_arrow_is_one_that_the_house_allows() -> None:
    assert not find_wrong_arrows(), "\n".join(find_wrong_arrows())


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert not find_circles()


def test_a_step_of_distill_passes_through_at_most_ten_files() -> None:
    assert len(list_files_of_a_step()) <= 10, list_files_of_a_step()
