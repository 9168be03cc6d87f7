// Reads "function a b c" lines and prints what m3vit_integer.h makes of them.
#include <iostream>
#include <string>

#include "m3vit_integer.h"

int main() {
    using namespace nnet::vit;
    std::string name;
    long long x, a, b;
    while (std::cin >> name >> x >> a >> b) {
        if (name == "shift_round")
            std::cout << shift_round(x, (int)a) << "\n";
        else if (name == "exp2_neg")
            std::cout << exp2_neg(x, (int)a, (int)b) << "\n";
        else if (name == "reciprocal" || name == "rsqrt") {
            const scaled y = name == "rsqrt" ? rsqrt((unsigned long long)x) : reciprocal((unsigned long long)x);
            std::cout << y.mantissa << " " << y.shift << "\n";
        } else
            std::cout << gelu_raw(x, (int)a) << "\n";
    }
    return 0;
}
