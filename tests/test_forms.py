"""Methods that must say the same, and subclasses that change one of them."""

from switchyard.forms import changed, changes_alone, keeps


class Root:
    def one(self): ...

    def other(self): ...


class OneAlone(Root):
    def one(self): ...


class Both(Root):
    def one(self): ...

    def other(self): ...


class OtherAfter(OneAlone):
    def other(self): ...


class OneAgain(Both):
    def one(self): ...


class Mixin:
    def one(self): ...


class Mixed(Mixin, Root): ...


def test_a_change_without_its_partner_is_seen():
    found = {cls.__name__: changes_alone(cls, "one", ("other",), Root) for cls in (Root, OneAlone, Both, OtherAfter)}
    assert found == {"Root": False, "OneAlone": True, "Both": False, "OtherAfter": False}
    assert changes_alone(OneAgain, "one", ("other",), Root)  # the partner is that of the class before
    assert changes_alone(Mixed, "one", ("other",), Root)


def test_what_is_changed_at_all():
    assert changed(OneAlone, "one", Root) and not changed(OneAlone, "other", Root) and not changed(Root, "one", Root)


def test_a_partner_is_kept_until_the_method_changes():
    assert keeps(Root, "one", "other") and keeps(Both, "one", "other") and keeps(OtherAfter, "one", "other")
    assert not keeps(OneAlone, "one", "other") and not keeps(Root, "one", "missing")
