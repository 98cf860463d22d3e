from pocketlm.instruction_sets import limit_libraries

limit_libraries()  # before torch computes anything
