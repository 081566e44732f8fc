"""The rooms and their arrows are as CONTRIBUTING draws them."""

from tests.house import find_circles, find_wrong_arrows


def test_every_arrow_is_one_that_the_house_allows() -> None:
    assert not find_wrong_arrows(), "\n".join(find_wrong_arrows())


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert not find_circles()
