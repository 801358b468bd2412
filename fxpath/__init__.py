"""fxpath: which neurons carried this decision, and do they form a path?"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
