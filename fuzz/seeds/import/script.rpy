define b = Character(_("Bo"), color="#fff")
default pname = "Sam"
label start:
    scene bg sea with fade
    b happy "{i}Where{/i} is the boat, [pname]? [score!t] {rb}a{/rb}{rt}b{/rt}"
    menu:
        "Ask" if x > 2:
            b """
            One.

            Two.
            """
            menu:
                "More":
                    extend " gone %(gold)d"
        'Leave':
            jump start
    python:
        y = {"a": 'b'}
translate french start_1:
    b "Bonjour"
