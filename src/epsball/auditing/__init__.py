"""How robust is it really: preflight, cascade, referee, verdict. `epsball.audit` is the door to it."""
