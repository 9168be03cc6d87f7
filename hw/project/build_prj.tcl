# Vitis HLS 2022.2 or newer: vitis_hls -f build_prj.tcl [-tclargs csim synth cosim export]   (default: csim synth export)
# (from 2024.2 on also: vitis-run --mode hls --tcl build_prj.tcl)
# Never run in the tool itself by the authors, who had no licence: please report what your version makes of it.
set here [file normalize [file dirname [info script]]]
source [file join $here project.tcl]

set steps {csim synth export}
if {[info exists argv] && [llength $argv] > 0 && [string index [lindex $argv 0] 0] ne "-"} { set steps $argv }

open_project -reset ${project_name}_prj
set_top ${project_name}
add_files [file join $here firmware/${project_name}.cpp] -cflags "-std=c++14 -I$here"
add_files -tb [file join $here ${project_name}_test.cpp] -cflags "-std=c++14 -I$here"
open_solution -reset "solution1" -flow_target vivado
set_part $part
create_clock -period $clock_period -name default
set_clock_uncertainty $clock_uncertainty default
config_interface -m_axi_addr64
config_interface -m_axi_max_widen_bitwidth 128
config_compile -name_max_length 80

# Absolute paths: the test bench runs in a folder of the solution.
set frames "$here/firmware/weights/weights.bin $here/tb_data/images.bin $here/tb_data/tasks.bin"
if {"csim" in $steps} {
    csim_design -argv "$frames $here/tb_data/csim_outputs.bin"
    set outputs [open $here/tb_data/csim_outputs.bin rb]
    set expected [open $here/tb_data/expected_outputs.bin rb]
    if {[read $outputs] ne [read $expected]} { error "C-simulation differs from tb_data/expected_outputs.bin" }
    close $outputs
    close $expected
}
if {"synth" in $steps} { csynth_design }
if {"cosim" in $steps} { cosim_design -argv "$frames $here/tb_data/cosim_outputs.bin" }
if {"export" in $steps} { export_design -format ip_catalog -vendor m3vit -library hls -version 1.0 }
exit
